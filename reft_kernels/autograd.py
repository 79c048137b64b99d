"""The one autograd Function: what an edit saves, and in which order its gradients are formed.

Saved for backward: the edited rows before the edit (n, D), their codes (n, r), nothing of the size
of ``hidden``, and nothing at all for inputs that need no gradient. Derivatives of derivatives are
formed from the same, by ``differentiable``.

Folding, and parameters without a group dimension, are settled inside: outside, each would be a node
of the graph in both directions, and those cost more Python than the edit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reft_kernels import custom_ops, double_backward, grad_reuse, transforms
from reft_kernels.double_backward import Saved
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
        edited: Tensor
        if torch.compiler.is_compiling():
            edited = TracedEdit.apply(  # type: ignore[no-untyped-call]
                hidden, encode, bias, decode, plan, subtract, activation, backend, inplace
            )
            return edited
        grad_reuse.calibrate()
        # Autograd lets a Function with several results write into no view.
        apart = inplace and hidden._is_view()
        edited = LowRankEdit.apply(  # type: ignore[no-untyped-call]
            hidden, encode, bias, decode, plan, subtract, activation, backend, inplace and not apart
        )[0]
        return hidden.copy_(edited) if apart else edited
    out = hidden if inplace else hidden.clone(memory_format=torch.contiguous_format)
    encode, bias, decode, subtract = _settled(encode, bias, decode, subtract, activation)
    _edit(out, plan, encode, bias, decode, subtract, activation, backend, False, False)
    return out


_NONE = (None,) * 4


class LowRankEdit(torch.autograd.Function):
    """``h' = h + Rᵀ(act(W h + b) − σ R h)`` on the rows of a plan; see ``torch_backend``.

    Folded, A = W − σR and s = A h + b: then dW = dA, and R has the part −dA of its gradient.

    Returns h' and what is saved, (x, s, u, A), None where it is not. As results they have a graph,
    and that is all that derivatives of derivatives need: nothing is kept for them.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        return _forward(ctx, *args)

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, *of_saved: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if (
            grad_out is None
            or of_saved != _NONE
            or torch.is_grad_enabled()  # under create_graph=True, and only there
            or transforms.active()
            or transforms.batched(grad_out)
        ):
            return _differentiable_backward(ctx, grad_out, *of_saved)
        overwrite = grad_reuse.exclusive(grad_out)  # before a call to come holds it as well
        return _backward(ctx, grad_out, overwrite)


class TracedEdit(torch.autograd.Function):
    """The same with h' as its only result: Dynamo cannot leave a gradient None. Compiled functions
    are differentiated once."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor | None:
        return _forward(ctx, *args)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_out, False)


def _forward(
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
) -> tuple[Tensor | None, ...]:
    want_hidden, want_encode, want_bias, want_decode = ctx.needs_input_grad[:4]
    given = subtract
    matrix, vector, rotation, subtract = _settled(encode, bias, decode, subtract, activation)
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
        out, plan, matrix, vector, rotation, subtract, activation, backend, save_rows, want_decode
    )
    wants = (want_hidden, want_encode, want_bias, want_decode)
    ctx.edit = (plan, subtract, activation, backend, wants)
    ctx.folded, ctx.shape, ctx.dtype = folded, out.shape, out.dtype
    if matrix is None:  # then s is the bias, which is no result but an input
        ctx.save_for_backward(x, s, u, None, bias, decode)
        return out, x, None, u, None
    if folded:
        ctx.save_for_backward(x, s, u, matrix, None, decode)
        return out, x, s, u, matrix
    ctx.save_for_backward(x, s, u, encode, None, decode)
    return out, x, s, u, None


def _backward(ctx: Any, grad_out: Tensor, overwrite: bool) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs by the backend, without a graph."""
    x, s, u, encode, _, decode = ctx.saved_tensors
    plan, subtract, activation, backend, wants = ctx.edit
    with _full_precision(grad_out.device.type):
        d_hidden, *of_parameters = custom_ops.implementation(backend).edit_backward(
            grad_out.reshape(-1, grad_out.shape[-1]),
            plan,
            _stacked(encode, 3),
            _stacked(decode, 3),
            x,
            s,
            u,
            subtract=subtract,
            activation=activation,
            wants=wants,
            overwrite=overwrite,
        )
    if d_hidden is not None:
        d_hidden = grad_out if overwrite else d_hidden.view(grad_out.shape)
    return d_hidden, *_as_given(ctx, decode, *of_parameters)


def _differentiable_backward(
    ctx: Any, grad_out: Tensor | None, *of_results: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The same with a graph, from gradients of all results."""
    x, s, u, encode, bias, decode = ctx.saved_tensors
    plan, subtract, activation, _, wants = ctx.edit
    if grad_out is None:
        grad_out = decode.new_zeros(ctx.shape, dtype=ctx.dtype)
    rotation = _stacked(decode, 3)
    assert rotation is not None
    with _full_precision(grad_out.device.type):
        d_hidden, d_encode, d_bias, d_decode = double_backward.edit_backward(
            grad_out.reshape(-1, grad_out.shape[-1]),
            Saved(*of_results[:3]),
            plan,
            _stacked(encode, 3),
            _stacked(bias, 2),
            rotation,
            Saved(x, s, u),
            subtract=subtract,
            activation=activation,
            wants=wants,
        )
    if d_encode is not None and of_results[3] is not None:
        d_encode = d_encode + of_results[3]
    if d_hidden is not None:
        d_hidden = d_hidden.view(ctx.shape)
    return d_hidden, *_as_given(ctx, decode, d_encode, d_bias, d_decode)


def _as_given(
    ctx: Any,
    decode: Tensor,
    d_encode: Tensor | None,
    d_bias: Tensor | None,
    d_decode: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of W, b and R, and of what has none, from those of A, b and R with groups."""
    if ctx.folded and d_decode is not None:
        assert d_encode is not None
        d_decode -= d_encode
    if decode.ndim == 2:
        d_encode, d_bias, d_decode = (
            None if grad is None else grad[0] for grad in (d_encode, d_bias, d_decode)
        )
    if not ctx.needs_input_grad[1]:
        d_encode = None
    return d_encode, d_bias, d_decode, None, None, None, None, None


def _stacked(parameter: Tensor | None, dims: int) -> Tensor | None:
    """The parameter with its group dimension, with which it has ``dims`` dimensions."""
    if parameter is None or parameter.ndim == dims:
        return parameter
    return parameter.unsqueeze(0)


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
        encode, bias = _stacked(encode, 3), _stacked(bias, 2)
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
        saved = custom_ops.implementation(backend).edit_forward(
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
