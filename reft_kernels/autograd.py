"""The autograd Function of the edit: which tensors it saves, and in which order it forms gradients.

Saved for backward: the edited rows before the edit (n, D) and their coefficients (n, r). Nothing of
the size of ``hidden`` is saved, and nothing at all for inputs that need no gradient. Derivatives of
derivatives are formed from the same tensors, by ``double_backward``.

Folding and the group dimension are handled inside the Function. Outside, each would be a node of
the graph in both directions, and those cost more Python time than the edit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reft_kernels import custom_ops, double_backward, grad_reuse, torch_backend
from reft_kernels.dispatch import is_batched, within_transform
from reft_kernels.rows import RowPlan
from reft_kernels.spec import EditWeights, SavedRows, Wanted, fold


def edit(
    hidden: Tensor, plan: RowPlan, weights: EditWeights, backend: str, in_place: bool
) -> Tensor:
    """Run a checked edit on the backend "torch" or "triton", with a graph only if one is needed."""
    # Build what all layers share here: tensors made inside the Function cannot reach its backward
    # in a traced graph.
    if backend != "torch":
        _ = plan.device_offsets
    else:
        _ = plan.places if plan.slots is None else plan.run_places
    encode, bias, decode, subtract, activation = weights
    inputs = (hidden, encode, bias, decode)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        options = (plan, subtract, activation, backend)
        edited: Tensor
        if torch.compiler.is_compiling():
            edited = TracedEdit.apply(*inputs, *options, in_place)  # type: ignore[no-untyped-call]
            return edited
        if grad_reuse.uncalibrated:
            grad_reuse.calibrate()
        # A Function with several results may not write into a view.
        copied = in_place and hidden._is_view()
        edited = LowRankEdit.apply(  # type: ignore[no-untyped-call]
            *inputs, *options, in_place and not copied
        )[0]
        return hidden.copy_(edited) if copied else edited
    out = hidden if in_place else hidden.clone(memory_format=torch.contiguous_format)
    _edit(out, plan, _grouped_and_folded(weights), backend, save_rows=False, save_coeffs=False)
    return out


_NONE = (None,) * 4
_NO_CONTEXT = nullcontext()


class LowRankEdit(torch.autograd.Function):
    """``h' = h + Rᵀ(act(W h + b) − σ R h)`` on the rows of a plan; see ``torch_backend``.

    A folded edit uses A = W − σR and s = A h + b. Then dW = dA, and −dA is added to dR.

    The results are h' and the saved tensors (x, s, u, A), None for those that are not saved. As
    results they have a graph, which is all that derivatives of derivatives need.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        return _forward(ctx, *args)

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, *saved_grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if (
            grad_out is None
            or saved_grads != _NONE
            or torch.is_grad_enabled()  # only under create_graph=True
            or within_transform()
            or is_batched(grad_out)
        ):
            return _double_backward(ctx, grad_out, *saved_grads)
        overwrite = grad_reuse.exclusive(grad_out)  # before another call holds a reference to it
        return _backward(ctx, grad_out, overwrite)


class TracedEdit(torch.autograd.Function):
    """:class:`LowRankEdit` with h' as its only result: Dynamo cannot leave a gradient None.

    Compiled functions are differentiated once.
    """

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
    in_place: bool,
) -> tuple[Tensor | None, ...]:
    weights = _grouped_and_folded(EditWeights(encode, bias, decode, subtract, activation))
    want_hidden, want_encode, want_bias, want_decode = ctx.needs_input_grad[:4]
    folded = subtract and not weights.subtract
    # A part of dR is −dA.
    want_encode = want_encode or (folded and want_decode)
    if in_place:
        ctx.mark_dirty(hidden)
        out = hidden
    else:
        out = hidden.clone(memory_format=torch.contiguous_format)
    save_rows = want_encode or (weights.subtract and want_decode)
    x, s, u = _edit(out, plan, weights, backend, save_rows=save_rows, save_coeffs=want_decode)
    wanted = Wanted(want_hidden, want_encode, want_bias, want_decode)
    ctx.edit = (plan, weights.subtract, activation, backend, wanted)
    ctx.folded, ctx.grouped, ctx.shape, ctx.dtype = folded, decode.ndim == 3, out.shape, out.dtype
    if weights.encode is None:  # then s is the bias, which is no result but an input
        ctx.save_for_backward(x, s, u, None, bias, decode)
        return out, x, None, u, None
    if folded:
        ctx.save_for_backward(x, s, u, weights.encode, None, decode)
        return out, x, s, u, weights.encode
    ctx.save_for_backward(x, s, u, encode, None, decode)
    return out, x, s, u, None


def _backward(ctx: Any, grad_out: Tensor, overwrite: bool) -> tuple[Tensor | None, ...]:
    """Compute the gradients of the inputs by the backend, without a graph."""
    plan, weights, saved, backend, wanted = _of_forward(ctx)
    with _full_precision(grad_out.device.type):
        d_hidden, *parameter_grads = implementation(backend).edit_backward(
            grad_out.reshape(-1, grad_out.shape[-1]),
            plan,
            weights,
            saved,
            wanted,
            overwrite=overwrite,
        )
    if d_hidden is not None:
        d_hidden = grad_out if overwrite else d_hidden.view(grad_out.shape)
    return d_hidden, *_input_grads(ctx, *parameter_grads)


def _double_backward(
    ctx: Any, grad_out: Tensor | None, *result_grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of the inputs with a graph, from gradients of all results."""
    plan, weights, saved, _, wanted = _of_forward(ctx)
    if grad_out is None:
        grad_out = weights.decode.new_zeros(ctx.shape, dtype=ctx.dtype)
    with _full_precision(grad_out.device.type):
        d_hidden, d_encode, d_bias, d_decode = double_backward.edit_backward(
            grad_out.reshape(-1, grad_out.shape[-1]),
            SavedRows(*result_grads[:3]),
            plan,
            weights,
            saved,
            wanted,
        )
    if d_encode is not None and result_grads[3] is not None:
        d_encode = d_encode + result_grads[3]
    if d_hidden is not None:
        d_hidden = d_hidden.view(ctx.shape)
    return d_hidden, *_input_grads(ctx, d_encode, d_bias, d_decode)


def _of_forward(ctx: Any) -> tuple[RowPlan, EditWeights, SavedRows, str, Wanted]:
    """Return what the forward kept: plan, weights with a group dimension, saved rows, backend and
    wanted gradients."""
    x, s, u, encode, bias, decode = ctx.saved_tensors
    plan, subtract, activation, backend, wanted = ctx.edit
    if not ctx.grouped:
        encode, bias, decode = _with_groups(encode, 3), _with_groups(bias, 2), decode.unsqueeze(0)
    weights = EditWeights(encode, bias, decode, subtract, activation)
    return plan, weights, SavedRows(x, s, u), backend, wanted


def _input_grads(
    ctx: Any, d_encode: Tensor | None, d_bias: Tensor | None, d_decode: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of W, b, R and of the options, from those of A, b and R with groups."""
    if ctx.folded and d_decode is not None:
        assert d_encode is not None
        d_decode -= d_encode
    if not ctx.grouped:
        d_encode, d_bias, d_decode = (
            None if grad is None else grad[0] for grad in (d_encode, d_bias, d_decode)
        )
    if not ctx.needs_input_grad[1]:
        d_encode = None
    return d_encode, d_bias, d_decode, None, None, None, None, None


def _grouped_and_folded(weights: EditWeights) -> EditWeights:
    """Give the parameters a group dimension, and fold the subtraction where that is exact."""
    encode, bias, decode, subtract, activation = weights
    if decode.ndim == 3 and not subtract:
        return weights
    if decode.ndim == 2:
        encode, bias, decode = _with_groups(encode, 3), _with_groups(bias, 2), decode.unsqueeze(0)
    encode, subtract = fold(encode, decode, subtract, activation)
    return EditWeights(encode, bias, decode, subtract, activation)


def _with_groups(parameter: Tensor | None, dims: int) -> Tensor | None:
    """Return the parameter with its group dimension, with which it has ``dims`` dimensions."""
    if parameter is None or parameter.ndim == dims:
        return parameter
    return parameter.unsqueeze(0)


def _edit(
    out: Tensor,
    plan: RowPlan,
    weights: EditWeights,
    backend: str,
    *,
    save_rows: bool,
    save_coeffs: bool,
) -> SavedRows:
    """Edit ``out`` (…, D) in place, through a copy if its rows have no common stride."""
    rows = _row_view(out)
    target = out.reshape(-1, out.shape[-1]) if rows is None else rows
    with _full_precision(out.device.type):
        saved: SavedRows = implementation(backend).edit_forward(
            target, plan, weights, save_rows=save_rows, save_coeffs=save_coeffs
        )
    if rows is None:
        out.copy_(target.view(out.shape))
    return saved


def implementation(backend: str) -> Any:
    """Return the object with ``edit_forward`` and ``edit_backward`` of a backend."""
    return torch_backend if backend == "torch" else custom_ops.triton_implementation()


def _row_view(tensor: Tensor) -> Tensor | None:
    """View (…, D) as (N, D), or return None if the leading strides allow no such view."""
    try:
        return tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        return None


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """Switch autocast off: the edit accumulates in float32 inside any autocast region."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NO_CONTEXT
