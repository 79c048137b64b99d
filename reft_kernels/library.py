"""The kernels as opaque operators, for ``torch.compile`` only.

In eager mode a registered operator costs more than the kernel it launches, so there the launcher is called
directly. While compiling, Dynamo sees two operators with a schema and shapes, and no kernel.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from reft_kernels import torch_path
from reft_kernels.rows import RowPlan


def implementation(backend: str) -> Any:
    """What has ``edit_forward`` and ``edit_backward`` for a chosen backend, "torch" or "triton"."""
    if backend == "torch":
        return torch_path
    if torch.compiler.is_compiling():
        return _OPERATORS
    from reft_kernels._triton import launch

    return launch


@torch.library.custom_op("reft_kernels::edit_forward", mutates_args=("hidden",))
def _forward_op(
    hidden: Tensor,
    rows: Tensor,
    offsets: list[int],
    encode: Tensor | None,
    bias: Tensor | None,
    decode: Tensor,
    subtract: bool,
    activation: str | None,
    save_rows: bool,
    save_code: bool,
) -> list[Tensor]:
    from reft_kernels._triton import launch

    saved = launch.edit_forward(
        hidden,
        RowPlan(rows, tuple(offsets)),
        encode,
        bias,
        decode,
        subtract=subtract,
        activation=activation,
        save_rows=save_rows,
        save_code=save_code,
    )
    return [tensor for tensor in saved if tensor is not None]


@_forward_op.register_fake
def _(
    hidden: Tensor,
    rows: Tensor,
    offsets: list[int],
    encode: Tensor | None,
    bias: Tensor | None,
    decode: Tensor,
    subtract: bool,
    activation: str | None,
    save_rows: bool,
    save_code: bool,
) -> list[Tensor]:
    n, rank = rows.shape[0], decode.shape[-2]
    compute = torch_path.compute_dtype(hidden, decode)
    shapes = []
    if save_rows:
        shapes.append(hidden.new_empty(n, hidden.shape[-1]))
    if save_code:
        shapes.append(hidden.new_empty(n, rank, dtype=compute))
    if activation is not None:
        shapes.append(hidden.new_empty(n, rank, dtype=compute))
    return shapes


@torch.library.custom_op("reft_kernels::edit_backward", mutates_args=("grad_hidden",))
def _backward_op(
    grad_out: Tensor,
    grad_hidden: Tensor | None,
    rows: Tensor,
    offsets: list[int],
    encode: Tensor | None,
    decode: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    u: Tensor | None,
    subtract: bool,
    activation: str | None,
    wants: list[bool],
) -> list[Tensor]:
    from reft_kernels._triton import launch

    grads = launch.edit_backward(
        grad_out,
        grad_hidden,
        RowPlan(rows, tuple(offsets)),
        encode,
        decode,
        x,
        s,
        u,
        subtract=subtract,
        activation=activation,
        wants=(wants[0], wants[1], wants[2]),
    )
    return [grad for grad in grads if grad is not None]


@_backward_op.register_fake
def _(
    grad_out: Tensor,
    grad_hidden: Tensor | None,
    rows: Tensor,
    offsets: list[int],
    encode: Tensor | None,
    decode: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    u: Tensor | None,
    subtract: bool,
    activation: str | None,
    wants: list[bool],
) -> list[Tensor]:
    shapes = (decode.shape, decode.shape[:2], decode.shape)
    return [decode.new_empty(shape) for shape, want in zip(shapes, wants, strict=True) if want]


def _forward(
    hidden: Tensor,
    plan: RowPlan,
    encode: Tensor | None,
    bias: Tensor | None,
    decode: Tensor,
    *,
    subtract: bool,
    activation: str | None,
    save_rows: bool,
    save_code: bool,
) -> tuple[Tensor | None, ...]:
    saved = torch.ops.reft_kernels.edit_forward(
        hidden,
        plan.rows,
        list(plan.offsets),
        encode,
        bias,
        decode,
        subtract,
        activation,
        save_rows,
        save_code,
    )
    return _spread(saved, (save_rows, save_code, activation is not None))


def _backward(
    grad_out: Tensor,
    grad_hidden: Tensor | None,
    plan: RowPlan,
    encode: Tensor | None,
    decode: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    u: Tensor | None,
    *,
    subtract: bool,
    activation: str | None,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    grads = torch.ops.reft_kernels.edit_backward(
        grad_out,
        grad_hidden,
        plan.rows,
        list(plan.offsets),
        encode,
        decode,
        x,
        s,
        u,
        subtract,
        activation,
        list(wants),
    )
    return _spread(grads, wants)


def _spread(present: list[Tensor], slots: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """The returned tensors back in their three slots, None where none was asked for."""
    remaining = iter(present)
    return tuple(next(remaining) if slot else None for slot in slots)


_OPERATORS = SimpleNamespace(edit_forward=_forward, edit_backward=_backward)
