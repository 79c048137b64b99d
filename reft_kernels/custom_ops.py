"""The kernels as opaque operators, for ``torch.compile`` only.

In eager mode a registered operator costs more than the kernel it launches, so the launcher is
called directly. While compiling, Dynamo sees two operators with a schema and shapes, and no kernel.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from reft_kernels import torch_backend
from reft_kernels.rows import LaunchRows, RowPlan
from reft_kernels.spec import EditWeights, SavedRows, Wanted


def triton_implementation() -> Any:
    """Return the object with ``edit_forward`` and ``edit_backward``: the operators while compiling,
    else the launcher."""
    if torch.compiler.is_compiling():
        return _OPERATORS
    from reft_kernels._triton import launch

    return launch


@torch.library.custom_op("reft_kernels::edit_forward", mutates_args=("hidden",))
def _forward_op(
    hidden: Tensor,
    rows: Tensor,
    offsets: Tensor | None,
    num_groups: int,
    largest_group: int,
    slots: Tensor | None,
    scales: Tensor | None,
    encode: Tensor | None,
    bias: Tensor | None,
    decode: Tensor,
    subtract: bool,
    activation: str | None,
    save_rows: bool,
    save_coeffs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from reft_kernels._triton import launch

    saved = launch.edit_forward(
        hidden,
        LaunchRows(rows, offsets, num_groups, largest_group, slots, scales),
        EditWeights(encode, bias, decode, subtract, activation),
        save_rows=save_rows,
        save_coeffs=save_coeffs,
    )
    x, s, u = _filled(saved, hidden)
    return x, s, u


@_forward_op.register_fake
def _(
    hidden: Tensor,
    rows: Tensor,
    offsets: Tensor | None,
    num_groups: int,
    largest_group: int,
    slots: Tensor | None,
    scales: Tensor | None,
    encode: Tensor | None,
    bias: Tensor | None,
    decode: Tensor,
    subtract: bool,
    activation: str | None,
    save_rows: bool,
    save_coeffs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, (rank, dim) = rows.shape[0], decode.shape[-2:]
    compute = torch_backend.compute_dtype(hidden, decode)
    return (
        hidden.new_empty((n, dim) if save_rows else 0),
        hidden.new_empty((n, rank) if save_coeffs else 0, dtype=compute),
        hidden.new_empty((n, rank) if activation and slots is None else 0, dtype=compute),
    )


@torch.library.custom_op("reft_kernels::edit_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor,
    rows: Tensor,
    offsets: Tensor | None,
    num_groups: int,
    largest_group: int,
    encode: Tensor | None,
    decode: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    u: Tensor | None,
    subtract: bool,
    activation: str | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from reft_kernels._triton import launch

    grads = launch.edit_backward(
        grad_out,
        LaunchRows(rows, offsets, num_groups, largest_group),
        EditWeights(encode, None, decode, subtract, activation),
        SavedRows(x, s, u),
        Wanted(*wanted),
    )
    d_hidden, d_encode, d_bias, d_decode = _filled(grads, decode)
    # The launcher's gradients share memory; results of an operator may not.
    return d_hidden, d_encode.clone(), d_bias.clone(), d_decode.clone()


@_backward_op.register_fake
def _(
    grad_out: Tensor,
    rows: Tensor,
    offsets: Tensor | None,
    num_groups: int,
    largest_group: int,
    encode: Tensor | None,
    decode: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    u: Tensor | None,
    subtract: bool,
    activation: str | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        grad_out.new_empty(grad_out.shape if wanted[0] else 0),
        decode.new_empty(decode.shape if wanted[1] else 0),
        decode.new_empty(decode.shape[:2] if wanted[2] else 0),
        decode.new_empty(decode.shape if wanted[3] else 0),
    )


def _forward(
    hidden: Tensor,
    plan: RowPlan,
    weights: EditWeights,
    *,
    save_rows: bool,
    save_coeffs: bool,
) -> SavedRows:
    saved = torch.ops.reft_kernels.edit_forward(
        hidden,
        plan.rows,
        plan.device_offsets,
        plan.num_groups,
        plan.largest_group,
        plan.slots,
        plan.scales,
        *weights,
        save_rows,
        save_coeffs,
    )
    save_argument = bool(weights.activation) and plan.slots is None
    return SavedRows(*_selected(saved, (save_rows, save_coeffs, save_argument)))


def _backward(
    grad_out: Tensor,
    plan: RowPlan,
    weights: EditWeights,
    saved: SavedRows,
    wanted: Wanted,
    *,
    overwrite: bool = False,
) -> tuple[Tensor | None, ...]:
    # Never in place here: inductor lets the clones of a mutated argument share memory.
    assert not overwrite
    grads = torch.ops.reft_kernels.edit_backward(
        grad_out,
        plan.rows,
        plan.device_offsets,
        plan.num_groups,
        plan.largest_group,
        weights.encode,
        weights.decode,
        *saved,
        weights.subtract,
        weights.activation,
        list(wanted),
    )
    return _selected(grads, wanted)


def _filled(values: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Replace None by an empty tensor: the schema of an operator has no optional results."""
    return tuple(like.new_empty(0) if value is None else value for value in values)


def _selected(values: tuple[Tensor, ...], requested: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Replace the results that were not requested by None."""
    return tuple(value if want else None for value, want in zip(values, requested, strict=True))


_OPERATORS = SimpleNamespace(edit_forward=_forward, edit_backward=_backward)
