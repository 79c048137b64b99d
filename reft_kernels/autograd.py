"""The one autograd Function: what an edit saves, and in which order its gradients are formed.

Saved for backward: the edited rows before the edit (n, D), their codes (n, r), nothing of the size
of ``hidden``, and nothing at all for inputs that need no gradient. First derivatives only.

Folding, and parameters without a group dimension, are settled inside: outside, each would be a node
of the graph in both directions, and those cost more Python than the edit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reft_kernels import library, ownership
from reft_kernels.rows import RowPlan
from reft_kernels.spec import fold


def apply_edit(
    hidden: Tensor,
    plan: RowPlan,
    encode: Tensor | None,
    bias: Tensor | None,
    decode: Tensor,
    *,
    subtract: bool,
    activation: str | None,
    backend: str,
    inplace: bool,
) -> Tensor:
    """Run an already checked edit, with a graph only where one is needed."""
    # What all layers share is made here: tensors made inside the Function cannot reach its backward
    # in a traced graph.
    if backend != "torch":
        _ = plan.device_offsets
    else:
        _ = plan.places if plan.slots is None else plan.run_places
    parts = (hidden, encode, bias, decode)
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parts):
        ownership.calibrate()
        edited: Tensor = LowRankEdit.apply(  # type: ignore[no-untyped-call]
            hidden, encode, bias, decode, plan, subtract, activation, backend, inplace
        )
        return edited
    out = hidden if inplace else hidden.clone(memory_format=torch.contiguous_format)
    encode, bias, decode, subtract = _settled(encode, bias, decode, subtract, activation)
    _edit(out, plan, encode, bias, decode, subtract, activation, backend, False, False)
    return out


class LowRankEdit(torch.autograd.Function):
    """``h' = h + Rᵀ(act(W h + b) − σ R h)`` on the rows of a plan; see ``torch_path``.

    Folded, A = W − σR and s = A h + b: then dW = dA, and R has the part −dA of its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        encode: Tensor | None,
        bias: Tensor | None,
        decode: Tensor,
        plan: RowPlan,
        subtract: bool,
        activation: str | None,
        backend: str,
        inplace: bool,
    ) -> Tensor:
        want_hidden, want_encode, want_bias, want_decode = ctx.needs_input_grad[:4]
        grouped, given = decode.ndim == 3, subtract
        encode, bias, decode, subtract = _settled(encode, bias, decode, subtract, activation)
        folded = given and not subtract
        # dR has a part in dA.
        want_encode = want_encode or (folded and want_decode)
        if inplace:
            ctx.mark_dirty(hidden)
            out = hidden
        else:
            out = hidden.clone(memory_format=torch.contiguous_format)
        save_rows = want_encode or (subtract and want_decode)
        x, s, u = _edit(
            out, plan, encode, bias, decode, subtract, activation, backend, save_rows, want_decode
        )
        ctx.save_for_backward(x, s, u, encode, decode)
        wants = (want_hidden, want_encode, want_bias, want_decode)
        ctx.edit = (plan, subtract, activation, backend, wants)
        ctx.folded, ctx.grouped = folded, grouped
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, s, u, encode, decode = ctx.saved_tensors
        plan, subtract, activation, backend, wants = ctx.edit
        overwrite = ownership.exclusive(grad_out)
        with _full_precision(grad_out.device.type):
            d_hidden, d_encode, d_bias, d_decode = library.implementation(backend).edit_backward(
                grad_out.reshape(-1, grad_out.shape[-1]),
                plan,
                encode,
                decode,
                x,
                s,
                u,
                subtract=subtract,
                activation=activation,
                wants=wants,
                overwrite=overwrite,
            )
        if ctx.folded and d_decode is not None:
            d_decode -= d_encode
        if not ctx.grouped:
            d_encode, d_bias, d_decode = (
                None if grad is None else grad[0] for grad in (d_encode, d_bias, d_decode)
            )
        if not ctx.needs_input_grad[1]:
            d_encode = None
        if d_hidden is not None:
            d_hidden = grad_out if overwrite else d_hidden.view(grad_out.shape)
        return d_hidden, d_encode, d_bias, d_decode, None, None, None, None, None


def _settled(
    encode: Tensor | None,
    bias: Tensor | None,
    decode: Tensor,
    subtract: bool,
    activation: str | None,
) -> tuple[Tensor | None, Tensor | None, Tensor, bool]:
    """The parameters with a group dimension, the subtraction folded into the encoder where that is
    exact."""
    if decode.ndim == 2:
        decode = decode.unsqueeze(0)
        encode = None if encode is None else encode.unsqueeze(0)
        bias = None if bias is None else bias.unsqueeze(0)
    encode, subtract = fold(encode, decode, subtract, activation)
    return encode, bias, decode, subtract


def _edit(
    out: Tensor,
    plan: RowPlan,
    encode: Tensor | None,
    bias: Tensor | None,
    decode: Tensor,
    subtract: bool,
    activation: str | None,
    backend: str,
    save_rows: bool,
    save_code: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Edit ``out`` (…, D) in place, through a copy where its rows have no common stride."""
    rows = _row_view(out)
    target = out.reshape(-1, out.shape[-1]) if rows is None else rows
    with _full_precision(out.device.type):
        saved: tuple[Tensor | None, Tensor | None, Tensor | None]
        saved = library.implementation(backend).edit_forward(
            target,
            plan,
            encode,
            bias,
            decode,
            subtract=subtract,
            activation=activation,
            save_rows=save_rows,
            save_code=save_code,
        )
    if rows is None:
        out.copy_(target.view(out.shape))
    return saved


def _row_view(tensor: Tensor) -> Tensor | None:
    """(…, D) seen as (N, D), or None where the leading strides allow no such view."""
    try:
        return tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        return None


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """Keep autocast out: the edit accumulates in float32 whatever surrounds it."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
