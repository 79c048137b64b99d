"""The only caller of the kernels: allocates what they write, computes grids, launches.

Same two functions and the same meaning as ``torch_backend``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from reft_kernels._triton import interpreted
from reft_kernels._triton.backward import edit_codes_grad_kernel, edit_columns_grad_kernel
from reft_kernels._triton.configs import choose, device_name, target_of
from reft_kernels._triton.forward import edit_rows_kernel
from reft_kernels.rows import LaunchRows, RowPlan

if interpreted():
    from reft_kernels._triton.interpreter import allow_new_numpy

    allow_new_numpy()

_ACCUMULATE = {torch.float32: tl.float32, torch.float64: tl.float64}


P = ParamSpec("P")
T = TypeVar("T")


def _on_its_device(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` with the device of its first argument current: Triton launches on the
    current device and its stream, wherever the tensors are."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        tensor: Any = args[0]
        if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(tensor.device):
            return function(*args, **kwargs)

    return guarded


@_on_its_device
def edit_forward(
    hidden: Tensor,
    plan: RowPlan | LaunchRows,
    encode: Tensor | None,
    bias: Tensor | None,
    decode: Tensor,
    *,
    subtract: bool,
    activation: str | None,
    save_rows: bool,
    save_code: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Edit ``hidden`` (N, D) in place; returns x (n, D), s (n, r), u (n, r) as asked."""
    rank, dim = decode.shape[-2:]
    n, offsets = plan.rows.shape[0], plan.device_offsets
    compute = _compute_dtype(hidden, decode)
    x = hidden.new_empty(n, dim) if save_rows else None
    s = hidden.new_empty(n, rank, dtype=compute) if save_code else None
    keeps_argument = activation is not None and plan.slots is None
    u = hidden.new_empty(n, rank, dtype=compute) if keeps_argument else None
    config = choose(
        "rows",
        dim=dim,
        rank=rank,
        num_rows=plan.largest_group,
        dtype=compute if compute is torch.float64 else hidden.dtype,
        target=target_of(hidden.device),
        device=device_name(hidden.device),
        groups=plan.num_groups,
    )
    decode = decode.contiguous()
    edit_rows_kernel[triton.cdiv(plan.largest_group, config.rows), plan.num_groups](
        hidden,
        hidden.stride(0),
        hidden.stride(1),
        plan.rows,
        plan.rows if offsets is None else offsets,
        plan.largest_group,
        plan.rows if plan.slots is None else plan.slots,
        decode if plan.scales is None else plan.scales,
        decode if encode is None else encode.contiguous(),
        decode if bias is None else bias.contiguous(),
        decode,
        hidden if x is None else x,
        hidden if s is None else s,
        hidden if u is None else u,
        dim,
        DIM=dim,
        RANK=rank,
        HAS_OFFSETS=offsets is not None,
        HAS_ENCODE=encode is not None,
        HAS_BIAS=bias is not None,
        HAS_SLOTS=plan.slots is not None,
        HAS_SCALES=plan.scales is not None,
        SUBTRACT=subtract,
        ACTIVATION=activation or "",
        SAVE_X=x is not None,
        SAVE_S=s is not None,
        SAVE_U=u is not None,
        BLOCK_N=config.rows,
        BLOCK_R=config.rank,
        BLOCK_D=config.chunk,
        DOT=config.dot,
        PRECISION=config.precision,
        STAGES=config.stages,
        ACC=_ACCUMULATE[compute],
        **config.launch_options,
    )
    return x, s, u


@_on_its_device
def edit_backward(
    grad_out: Tensor,
    plan: RowPlan | LaunchRows,
    encode: Tensor | None,
    decode: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    u: Tensor | None,
    *,
    subtract: bool,
    activation: str | None,
    wants: tuple[bool, bool, bool, bool],
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dh (N, D), dA, db and dR, None where not wanted. dh is a new tensor, or with ``overwrite``
    grad_out itself, which is contiguous then, its edited rows rewritten."""
    rank, dim = decode.shape[-2:]
    n, offsets = plan.rows.shape[0], plan.device_offsets
    compute = _compute_dtype(grad_out, decode)
    shape: dict[str, Any] = {
        "dim": dim,
        "rank": rank,
        "num_rows": plan.largest_group,
        "dtype": compute if compute is torch.float64 else grad_out.dtype,
        "target": target_of(grad_out.device),
        "device": device_name(grad_out.device),
        "groups": plan.num_groups,
    }
    want_hidden, want_encode, want_bias, want_decode = wants
    write_rows = want_hidden and encode is not None
    d_hidden = None
    if want_hidden:
        d_hidden = grad_out if overwrite else grad_out.clone(memory_format=torch.contiguous_format)
    want_code = want_encode or want_bias or write_rows
    want_difference = subtract and (want_decode or write_rows)
    if not (want_code or want_decode):
        return d_hidden, None, None, None

    decode = decode.contiguous()
    encode = decode if encode is None else encode.contiguous()
    grad_strides = (grad_out.stride(0), grad_out.stride(1))
    du = grad_out.new_empty(n, rank, dtype=compute) if want_code else None
    ds = grad_out.new_empty(n, rank, dtype=compute) if want_difference else None
    if want_code or want_difference:
        config = choose("rows", **shape)
        edit_codes_grad_kernel[triton.cdiv(plan.largest_group, config.rows), plan.num_groups](
            grad_out,
            *grad_strides,
            plan.rows,
            plan.rows if offsets is None else offsets,
            plan.largest_group,
            decode,
            decode if u is None else u,
            decode if du is None else du,
            decode if ds is None else ds,
            dim,
            DIM=dim,
            RANK=rank,
            HAS_OFFSETS=offsets is not None,
            ACTIVATION=activation or "",
            SAVE_DU=du is not None,
            SAVE_DS=ds is not None,
            BLOCK_N=config.rows,
            BLOCK_R=config.rank,
            BLOCK_D=config.chunk,
            DOT=config.dot,
            PRECISION=config.precision,
            STAGES=config.stages,
            ACC=_ACCUMULATE[compute],
            **config.launch_options,
        )

    config = choose("columns", **shape)
    # The sums of a split lie behind one another, so that one reduction adds the splits of all.
    shapes = (decode.shape, decode.shape[:-1], decode.shape)
    sizes = [shape.numel() if want else 0 for shape, want in zip(shapes, wants[1:], strict=True)]
    # The bias, which is short, comes last: the matrices stay aligned.
    starts = (0, sizes[0] + sizes[2], sizes[0])
    sums = grad_out.new_empty(config.splits, sum(sizes), dtype=compute)
    d_encode, d_bias, d_decode = _parts(sums[0], shapes, sizes, starts)
    # Columns are divided among programs; without any to divide, one program sums the bias.
    columns = triton.cdiv(dim, config.chunk) if write_rows or want_encode or want_decode else 1
    edit_columns_grad_kernel[columns, plan.num_groups, config.splits](
        grad_out,
        *grad_strides,
        grad_out if d_hidden is None else d_hidden,
        plan.rows,
        plan.rows if offsets is None else offsets,
        plan.largest_group,
        encode,
        decode,
        grad_out if x is None else x,
        decode if s is None else s,
        decode if du is None else du,
        decode if ds is None else ds,
        decode if d_encode is None else d_encode,
        decode if d_bias is None else d_bias,
        decode if d_decode is None else d_decode,
        sums.stride(0),
        rank,
        DIM=dim,
        RANK=rank,
        HAS_OFFSETS=offsets is not None,
        WRITE_ROWS=write_rows,
        WANT_ENCODE=want_encode,
        WANT_BIAS=want_bias,
        WANT_DECODE=want_decode,
        SUBTRACT=want_difference,
        BLOCK_N=config.rows,
        BLOCK_R=config.rank,
        BLOCK_D=config.chunk,
        DOT=config.dot,
        PRECISION=config.precision,
        STAGES=config.stages,
        ACC=_ACCUMULATE[compute],
        **config.launch_options,
    )
    if not any(sizes):
        return d_hidden, None, None, None
    whole = (sums[0] if config.splits == 1 else sums.sum(0)).to(decode.dtype)
    return d_hidden, *_parts(whole, shapes, sizes, starts)


def _parts(
    flat: Tensor, shapes: Sequence[torch.Size], sizes: Sequence[int], starts: Sequence[int]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dA, db and dR as views of where they lie together, None where the size is 0."""
    encode, bias, decode = (
        flat[start : start + size].view(shape) if size else None
        for shape, size, start in zip(shapes, sizes, starts, strict=True)
    )
    return encode, bias, decode


def _compute_dtype(hidden: Tensor, parameter: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (hidden.dtype, parameter.dtype) else torch.float32
