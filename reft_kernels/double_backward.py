"""The gradients of an edit as a graph of their own, for derivatives of derivatives.

The kernels and the torch path compute first derivatives on data. Under ``create_graph=True`` the
same gradients are formed here from tensors that have a graph: what backward was given, the
parameters, and the saved x, s and u, which are results of the edit beside h' and so send gradients
of theirs back into it. No larger than the edit's own backward, but for one wide copy of the
upstream gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels.activations import activation_grad
from reft_kernels.rows import Place, RowPlan
from reft_kernels.torch_backend import compute_dtype


class Saved(NamedTuple):
    """What an edit saves, or the gradients of that: x (n, D), s (n, r), u (n, r), each or None."""

    x: Tensor | None = None
    s: Tensor | None = None
    u: Tensor | None = None


def edit_backward(
    grad_out: Tensor,
    of_saved: Saved,
    plan: RowPlan,
    encode: Tensor | None,
    bias: Tensor | None,
    decode: Tensor,
    saved: Saved,
    *,
    subtract: bool,
    activation: str | None,
    wants: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the edit for upstream v = ``grad_out`` (N, D) and g of x, s and u.

        ds = v Rᵀ + g_s    du = ds · act′(u) + g_u    dh = v + du A − σ ds R + g_x
        dA = duᵀ x    db = Σ du    dR = sᵀ v − σ dsᵀ x

    Args:
        of_saved: g, None for 0.
        encode, decode: (g, r, D). bias: (g, r), read where there is no encode: s is the bias then.
        wants: which of dh, dA, db and dR to return; the others are None.
    """
    compute = compute_dtype(grad_out, decode)
    want_hidden, want_encode, want_bias, want_decode = wants
    wide = d_hidden = grad_out.to(compute)
    grads: tuple[list[Tensor], ...] = ([], [], [])
    for k, place in enumerate(plan.places):
        own = slice(plan.offsets[k], plan.offsets[k + 1])
        (x, s, u), (g_x, g_s, g_u) = (
            (_part(value, own, place, compute) for value in values) for values in (saved, of_saved)
        )
        v, r = place.read(wide), decode[k].to(compute)
        ds = _sum(v @ r.T, g_s)
        du = _sum(ds if u is None else activation_grad(activation, u, ds), g_u)
        if want_encode:
            assert x is not None
            grads[0].append(du.T @ x)
        if want_bias:
            grads[1].append(du.sum(0))
        if want_decode:
            if encode is None:
                assert bias is not None
                s = bias[k].to(compute).expand(v.shape[0], -1)
            assert s is not None
            outer = s.T @ v
            if subtract:
                assert x is not None
                outer = outer - ds.T @ x
            grads[2].append(outer)
        if want_hidden and encode is not None:
            dh = _sum(du @ encode[k].to(compute), g_x)
            if subtract:
                dh = dh - ds @ r
            # A −1 borrowed a row: it adds 0 there.
            d_hidden = d_hidden.index_add(0, place.rows, place.cleared(dh))
    d_encode, d_bias, d_decode = (
        torch.stack(parts).to(decode.dtype) if parts else None for parts in grads
    )
    rounded = d_hidden.to(grad_out.dtype) if want_hidden else None
    return rounded, d_encode, d_bias, d_decode


def _part(value: Tensor | None, own: slice, place: Place, dtype: torch.dtype) -> Tensor | None:
    """The rows of one group, wide, 0 where there is no row: a kernel may have left any number."""
    return None if value is None else place.cleared(value[own]).to(dtype)


def _sum(value: Tensor, more: Tensor | None) -> Tensor:
    return value if more is None else value + more
