"""The kernels as opaque operators, for ``torch.compile`` only.

In eager mode a registered operator costs more than the kernel it launches, so there the launcher is
called directly. While compiling, Dynamo sees two operators with a schema and shapes, and no kernel.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from reft_kernels import torch_backend
from reft_kernels.rows import LaunchRows, RowPlan


def implementation(backend: str) -> Any:
    """What has ``edit_forward`` and ``edit_backward`` for a chosen backend, "torch" or "triton"."""
    if backend == "torch":
        return torch_backend
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
    save_code: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from reft_kernels._triton import launch

    saved = launch.edit_forward(
        hidden,
        LaunchRows(rows, offsets, num_groups, largest_group, slots, scales),
        encode,
        bias,
        decode,
        subtract=subtract,
        activation=activation,
        save_rows=save_rows,
        save_code=save_code,
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
    save_code: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, (rank, dim) = rows.shape[0], decode.shape[-2:]
    compute = torch_backend.compute_dtype(hidden, decode)
    return (
        hidden.new_empty((n, dim) if save_rows else 0),
        hidden.new_empty((n, rank) if save_code else 0, dtype=compute),
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
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from reft_kernels._triton import launch

    grads = launch.edit_backward(
        grad_out,
        LaunchRows(rows, offsets, num_groups, largest_group),
        encode,
        decode,
        x,
        s,
        u,
        subtract=subtract,
        activation=activation,
        wants=(wants[0], wants[1], wants[2], wants[3]),
    )
    d_hidden, d_encode, d_bias, d_decode = _filled(grads, decode)
    # The launcher's lie together in memory; results of an operator may not.
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
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        grad_out.new_empty(grad_out.shape if wants[0] else 0),
        decode.new_empty(decode.shape if wants[1] else 0),
        decode.new_empty(decode.shape[:2] if wants[2] else 0),
        decode.new_empty(decode.shape if wants[3] else 0),
    )


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
        plan.device_offsets,
        plan.num_groups,
        plan.largest_group,
        plan.slots,
        plan.scales,
        encode,
        bias,
        decode,
        subtract,
        activation,
        save_rows,
        save_code,
    )
    return _chosen(saved, (save_rows, save_code, bool(activation) and plan.slots is None))


def _backward(
    grad_out: Tensor,
    plan: RowPlan,
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
) -> tuple[Tensor | None, ...]:
    # Never in place here: inductor lets the clones of a mutated argument share memory.
    assert not overwrite
    grads = torch.ops.reft_kernels.edit_backward(
        grad_out,
        plan.rows,
        plan.device_offsets,
        plan.num_groups,
        plan.largest_group,
        encode,
        decode,
        x,
        s,
        u,
        subtract,
        activation,
        list(wants),
    )
    return _chosen(grads, wants)


def _filled(values: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """None as an empty tensor: the schema of an operator has no optional results."""
    return tuple(like.new_empty(0) if value is None else value for value in values)


def _chosen(values: tuple[Tensor, ...], asked: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The results that were asked for, None for the others."""
    return tuple(value if wanted else None for value, wanted in zip(values, asked, strict=True))


_OPERATORS = SimpleNamespace(edit_forward=_forward, edit_backward=_backward)
