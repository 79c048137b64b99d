"""The edit in batched PyTorch calls, forward and backward: the path wherever Triton is not.

Per group: gather rows, one product with the encoder, one with the decoder, write the rows back.
Nothing of the size of ``hidden`` is read or allocated, nothing synchronises with the device.

Rows marked −1 must change nothing, yet shapes stay static: see :class:`reft_kernels.rows.Place`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels.activations import activate, activation_grad
from reft_kernels.rows import RowPlan


def edit_forward(
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Edit ``hidden`` (N, D) in place; parameters (g, r, D), bias (g, r).

    Returns:
        x (n, D): the rows before the edit, in hidden's dtype; s (n, r): their codes; u (n, r): the
        argument of the activation. None where not asked for (u: where there is no activation).
    """
    compute = compute_dtype(hidden, decode)
    if plan.slots is not None:
        assert not (save_rows or save_code)
        _edit_from_table(
            hidden, plan, encode, bias, decode, compute, subtract=subtract, activation=activation
        )
        return None, None, None
    saved_x, saved_s, saved_u = [], [], []
    for k, place in enumerate(plan.places):
        x = place.read(hidden)
        h, r = x.to(compute), decode[k].to(compute)
        if encode is None:
            assert bias is not None
            u = bias[k].to(compute).expand(h.shape[0], -1)
        elif bias is None:
            u = h @ encode[k].to(compute).T
        else:
            u = torch.addmm(bias[k].to(compute), h, encode[k].to(compute).T)
        s = activate(activation, u)
        if subtract:
            s = s - h @ r.T
        edited = h.addmm(s, r) if save_rows and h is x else h.addmm_(s, r)
        place.write(hidden, edited.to(hidden.dtype))
        if save_rows:
            saved_x.append(x)
        if save_code:
            saved_s.append(s)
        if activation is not None:
            saved_u.append(u)
    return _joined(saved_x), _joined(saved_s), _joined(saved_u)


def edit_backward(
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the edit for upstream v = ``grad_out`` (N, D).

        ds = v Rᵀ    du = ds · act′(u)    dh = v + du A − σ ds R    dA = duᵀ x    db = Σ du
        dR = sᵀ v − σ dsᵀ x

    Args:
        wants: which of dh (N, D), dA (g, r, D), db (g, r), dR (g, r, D) to return; the others are
            None.
        overwrite: whether dh may be ``grad_out`` itself, its edited rows rewritten; else it is a
            new tensor: autograd owns ``grad_out``.
    """
    compute = compute_dtype(grad_out, decode)
    want_hidden, want_encode, want_bias, want_decode = wants
    d_hidden = None
    if want_hidden:
        d_hidden = grad_out if overwrite else grad_out.clone(memory_format=torch.contiguous_format)
    grads: tuple[list[Tensor], ...] = ([], [], [])
    for k, place in enumerate(plan.places):
        own = slice(plan.offsets[k], plan.offsets[k + 1])
        v = place.read(grad_out).to(compute)
        r = decode[k].to(compute)
        ds = v @ r.T
        du = ds if u is None else activation_grad(activation, u[own], ds)
        if want_encode:
            assert x is not None
            grads[0].append(du.T @ x[own].to(compute))
        if want_bias:
            grads[1].append(du.sum(0))
        if want_decode:
            assert s is not None
            outer = s[own].T @ v
            if subtract:
                assert x is not None
                outer = outer.addmm(ds.T, x[own].to(compute), alpha=-1)
            grads[2].append(outer)
        if d_hidden is not None and encode is not None:
            # v is a copy, and this its last use.
            dh = v.addmm_(du, encode[k].to(compute))
            if subtract:
                dh = dh.addmm_(ds, r, alpha=-1)
            place.write(d_hidden, dh.to(d_hidden.dtype))
    d_encode, d_bias, d_decode = (
        torch.stack(parts).to(decode.dtype) if parts else None for parts in grads
    )
    return d_hidden, d_encode, d_bias, d_decode


def _edit_from_table(
    hidden: Tensor,
    plan: RowPlan,
    encode: Tensor | None,
    bias: Tensor | None,
    decode: Tensor,
    compute: torch.dtype,
    *,
    subtract: bool,
    activation: str | None,
) -> None:
    """:func:`edit_forward` with entries of tables (E, r, D): groups of one size in one batched
    product, whatever entries they use, so that the number of calls does not grow with the number of
    adapters."""
    assert plan.slots is not None
    for (first, last), place in zip(plan.runs, plan.run_places, strict=True):
        entry = plan.slots[first:last].clamp(min=0)
        groups = last - first

        def own(table: Tensor, entry: Tensor = entry) -> Tensor:
            return table.index_select(0, entry).to(compute)

        h = place.read(hidden).to(compute).view(groups, -1, hidden.shape[-1])
        r = own(decode)
        if encode is None:
            assert bias is not None
            u = own(bias).unsqueeze(1).expand(-1, h.shape[1], -1)
        elif bias is None:
            u = h @ own(encode).mT
        else:
            u = torch.baddbmm(own(bias).unsqueeze(1), h, own(encode).mT)
        s = activate(activation, u)
        if subtract:
            s = s - h @ r.mT
        if plan.scales is not None:
            s = s * plan.scales[first:last].to(compute).view(-1, 1, 1)
        edited = torch.baddbmm(h, s, r)
        place.write(hidden, edited.view(-1, hidden.shape[-1]).to(hidden.dtype))


def compute_dtype(hidden: Tensor, parameter: Tensor) -> torch.dtype:
    """The accumulation dtype: float32, or float64 where either tensor is."""
    return torch.promote_types(torch.promote_types(hidden.dtype, parameter.dtype), torch.float32)


def _joined(parts: list[Tensor]) -> Tensor | None:
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)
