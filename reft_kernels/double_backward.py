"""The gradients of an edit with a graph of their own, for derivatives of derivatives.

The kernels and the torch backend compute first derivatives on data. Under ``create_graph=True`` the
same gradients are formed here from tensors that have a graph: the arguments of backward, the
parameters, and the saved x, s and u. Like h', those are results of the autograd Function, so their
gradients flow back into it. Memory is that of the edit's own backward plus one copy of the upstream
gradient in the dtype of the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels.activations import activation_grad
from reft_kernels.rows import Place, RowPlan
from reft_kernels.spec import EditWeights, SavedRows, Wanted
from reft_kernels.torch_backend import compute_dtype


def edit_backward(
    grad_out: Tensor,
    saved_grads: SavedRows,
    plan: RowPlan,
    weights: EditWeights,
    saved: SavedRows,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients for upstream v = ``grad_out`` (N, D) and g of x, s and u.

        ds = v Rᵀ + g_s    du = ds · act′(u) + g_u    dh = v + du A − σ ds R + g_x
        dA = duᵀ x    db = Σ du    dR = sᵀ v − σ dsᵀ x

    Args:
        saved_grads: g, None for 0.
        weights: with a group dimension. The bias is read if there is no encode: it is s then.

    Returns:
        dh, dA, db and dR, None where not wanted.
    """
    encode, _, decode, subtract, _ = weights
    wide = d_hidden = grad_out.to(compute_dtype(grad_out, decode))
    grads: tuple[list[Tensor], ...] = ([], [], [])
    for k, place in enumerate(plan.places):
        x, s, u = _group_rows(saved, k, plan, wide.dtype)
        g = _group_rows(saved_grads, k, plan, wide.dtype)
        v, r = place.read(wide), decode[k].to(wide.dtype)
        ds = _sum(v @ r.T, g.s)
        du = _sum(ds if u is None else activation_grad(weights.activation, u, ds), g.u)
        if wanted.encode:
            assert x is not None
            grads[0].append(du.T @ x)
        if wanted.bias:
            grads[1].append(du.sum(0))
        if wanted.decode:
            outer = _coeffs(weights, s, k, v).T @ v
            if subtract:
                assert x is not None
                outer = outer - ds.T @ x
            grads[2].append(outer)
        if wanted.hidden and encode is not None:
            dh = _sum(du @ encode[k].to(wide.dtype), g.x)
            if subtract:
                dh = dh - ds @ r
            # A −1 borrowed a row: it adds 0 there.
            d_hidden = d_hidden.index_add(0, place.rows, place.cleared(dh))
    d_encode, d_bias, d_decode = (
        torch.stack(parts).to(decode.dtype) if parts else None for parts in grads
    )
    return (
        d_hidden.to(grad_out.dtype) if wanted.hidden else None, d_encode, d_bias, d_decode
    )  # fmt: skip


def _group_rows(values: SavedRows, k: int, plan: RowPlan, dtype: torch.dtype) -> SavedRows:
    """Return the rows of group k in ``dtype``, 0 where there is no row: a kernel may have left any
    number there."""
    group, place = slice(plan.offsets[k], plan.offsets[k + 1]), plan.places[k]
    return SavedRows(*(_rows(value, group, place, dtype) for value in values))


def _rows(value: Tensor | None, group: slice, place: Place, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else place.cleared(value[group]).to(dtype)


def _coeffs(weights: EditWeights, s: Tensor | None, k: int, v: Tensor) -> Tensor:
    """Return s of group k, in the dtype of its upstream rows v; without an encoder it is the bias
    of every row."""
    if weights.encode is None:
        assert weights.bias is not None
        return weights.bias[k].to(v.dtype).expand(v.shape[0], -1)
    assert s is not None
    return s


def _sum(value: Tensor, other: Tensor | None) -> Tensor:
    return value if other is None else value + other
