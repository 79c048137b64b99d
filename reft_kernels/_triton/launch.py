"""The only caller of the kernels: allocate their outputs, compute grids, launch.

``edit_forward`` and ``edit_backward`` have the signatures and the meaning of those in
``torch_backend``.
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
from reft_kernels._triton.backward import edit_params_grad_kernel, edit_rows_grad_kernel
from reft_kernels._triton.configs import KernelConfig, choose, device_name, target_of
from reft_kernels._triton.forward import edit_rows_kernel
from reft_kernels.rows import LaunchRows, RowPlan
from reft_kernels.spec import EditWeights, SavedRows, Wanted

if interpreted():
    from reft_kernels._triton.interpreter import allow_new_numpy

    allow_new_numpy()

_ACCUMULATE = {torch.float32: tl.float32, torch.float64: tl.float64}


P = ParamSpec("P")
T = TypeVar("T")


def _on_device_of_tensor(function: Callable[P, T]) -> Callable[P, T]:
    """Make the device of the first argument current while ``function`` runs: Triton launches on the
    current device and its stream, wherever the tensors are."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        tensor: Any = args[0]
        if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(tensor.device):
            return function(*args, **kwargs)

    return guarded


@_on_device_of_tensor
def edit_forward(
    hidden: Tensor,
    plan: RowPlan | LaunchRows,
    weights: EditWeights,
    *,
    save_rows: bool,
    save_coeffs: bool,
) -> SavedRows:
    """Edit ``hidden`` (N, D) in place; return x and s if requested, and u if there is an
    activation."""
    encode, bias, decode, subtract, activation = weights
    rank, dim = decode.shape[-2:]
    n, offsets = plan.rows.shape[0], plan.device_offsets
    compute = _compute_dtype(hidden, decode)
    x = hidden.new_empty(n, dim) if save_rows else None
    s = hidden.new_empty(n, rank, dtype=compute) if save_coeffs else None
    save_argument = activation is not None and plan.slots is None
    u = hidden.new_empty(n, rank, dtype=compute) if save_argument else None
    config = _settings("rows", hidden, plan, decode, compute)
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
        SAVE_X=save_rows,
        SAVE_S=save_coeffs,
        SAVE_U=save_argument,
        ACC=_ACCUMULATE[compute],
        **config.arguments,
    )
    return SavedRows(x, s, u)


@_on_device_of_tensor
def edit_backward(
    grad_out: Tensor,
    plan: RowPlan | LaunchRows,
    weights: EditWeights,
    saved: SavedRows,
    wanted: Wanted,
    *,
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute dh (N, D), dA, db and dR, None where not wanted.

    dh is a new tensor. With ``overwrite`` it is ``grad_out``, which must be contiguous, with its
    edited rows rewritten.
    """
    d_hidden = None
    if wanted.hidden:
        d_hidden = grad_out if overwrite else grad_out.clone(memory_format=torch.contiguous_format)
    write_rows = wanted.hidden and weights.encode is not None
    need_du = wanted.encode or wanted.bias or write_rows
    need_ds = weights.subtract and (wanted.decode or write_rows)
    if not (need_du or wanted.decode):
        return d_hidden, None, None, None
    encode, decode = weights.encode, weights.decode.contiguous()
    encode = decode if encode is None else encode.contiguous()
    du = ds = None
    if need_du or need_ds:
        du, ds = _coeffs_grad(
            grad_out, plan, decode, saved.u, weights.activation, (need_du, need_ds)
        )
    # dh is written over v, in d_hidden.
    rows_out = d_hidden if write_rows else None
    parameter_grads = _params_grad(
        grad_out, rows_out, plan, (encode, decode), saved, (du, ds), wanted
    )
    return d_hidden, *parameter_grads


def _coeffs_grad(
    grad_out: Tensor,
    plan: RowPlan | LaunchRows,
    decode: Tensor,
    u: Tensor | None,
    activation: str | None,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Launch ``edit_rows_grad``: du and ds (n, r), None where not ``needed``."""
    rank, dim = decode.shape[-2:]
    n, offsets = plan.rows.shape[0], plan.device_offsets
    compute = _compute_dtype(grad_out, decode)
    du = grad_out.new_empty(n, rank, dtype=compute) if needed[0] else None
    ds = grad_out.new_empty(n, rank, dtype=compute) if needed[1] else None
    config = _settings("rows", grad_out, plan, decode, compute)
    edit_rows_grad_kernel[triton.cdiv(plan.largest_group, config.rows), plan.num_groups](
        grad_out,
        grad_out.stride(0),
        grad_out.stride(1),
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
        ACC=_ACCUMULATE[compute],
        **config.arguments,
    )
    return du, ds


def _params_grad(
    grad_out: Tensor,
    rows_out: Tensor | None,
    plan: RowPlan | LaunchRows,
    matrices: tuple[Tensor, Tensor],
    saved: SavedRows,
    coeffs_grads: tuple[Tensor | None, Tensor | None],
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch ``edit_params_grad``: dA, db and dR, None where not wanted; dh goes to ``rows_out``.

    Args:
        matrices: A and R, (g, r, D), contiguous.
        coeffs_grads: du and ds.
    """
    encode, decode = matrices
    du, ds = coeffs_grads
    rank, dim = decode.shape[-2:]
    offsets = plan.device_offsets
    compute = _compute_dtype(grad_out, decode)
    config = _settings("params", grad_out, plan, decode, compute)
    # One split's sums follow another's in memory, so that a single reduction adds all splits.
    shapes = (decode.shape, decode.shape[:-1], decode.shape)
    sizes = [shape.numel() if want else 0 for shape, want in zip(shapes, wanted[1:], strict=True)]
    # The bias, which is short, comes last: the matrices stay aligned.
    starts = (0, sizes[0] + sizes[2], sizes[0])
    sums = grad_out.new_empty(config.splits, sum(sizes), dtype=compute)
    d_encode, d_bias, d_decode = _parts(sums[0], shapes, sizes, starts)
    # Programs divide the columns; if only the bias is wanted, one program sums it.
    split_columns = rows_out is not None or wanted.encode or wanted.decode
    tiles = triton.cdiv(dim, config.chunk) if split_columns else 1
    edit_params_grad_kernel[tiles, plan.num_groups, config.splits](
        grad_out,
        grad_out.stride(0),
        grad_out.stride(1),
        grad_out if rows_out is None else rows_out,
        plan.rows,
        plan.rows if offsets is None else offsets,
        plan.largest_group,
        encode,
        decode,
        grad_out if saved.x is None else saved.x,
        decode if saved.s is None else saved.s,
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
        WRITE_ROWS=rows_out is not None,
        WANT_ENCODE=wanted.encode,
        WANT_BIAS=wanted.bias,
        WANT_DECODE=wanted.decode,
        SUBTRACT=ds is not None,
        ACC=_ACCUMULATE[compute],
        **config.arguments,
    )
    if not any(sizes):
        return None, None, None
    total = (sums[0] if config.splits == 1 else sums.sum(0)).to(decode.dtype)
    return _parts(total, shapes, sizes, starts)


def _parts(
    flat: Tensor, shapes: Sequence[torch.Size], sizes: Sequence[int], starts: Sequence[int]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dA, db and dR as views of the memory that they share, None where the size is 0."""
    encode, bias, decode = (
        flat[start : start + size].view(shape) if size else None
        for shape, size, start in zip(shapes, sizes, starts, strict=True)
    )
    return encode, bias, decode


def _settings(
    kernel: str, source: Tensor, plan: RowPlan | LaunchRows, decode: Tensor, compute: torch.dtype
) -> KernelConfig:
    """Choose the settings of a launch that reads the rows of ``source`` (N, D)."""
    rank, dim = decode.shape[-2:]
    return choose(
        kernel,
        dim=dim,
        rank=rank,
        num_rows=plan.largest_group,
        dtype=compute if compute is torch.float64 else source.dtype,
        target=target_of(source.device),
        device=device_name(source.device),
        groups=plan.num_groups,
    )


def _compute_dtype(hidden: Tensor, parameter: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (hidden.dtype, parameter.dtype) else torch.float32
