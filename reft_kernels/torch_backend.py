"""The edit in batched PyTorch calls, forward and backward, wherever Triton does not run.

Per group: gather the rows, one product with the encoder, one with the decoder, write the rows back.
Nothing of the size of ``hidden`` is read or allocated, and nothing synchronises with the device.

Rows marked −1 must change nothing although shapes are static: see :class:`reft_kernels.rows.Place`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels.activations import activate, activation_grad
from reft_kernels.rows import RowPlan
from reft_kernels.spec import EditWeights, SavedRows, Wanted


def edit_forward(
    hidden: Tensor,
    plan: RowPlan,
    weights: EditWeights,
    *,
    save_rows: bool,
    save_coeffs: bool,
) -> SavedRows:
    """Edit ``hidden`` (N, D) in place.

    Args:
        weights: with a group dimension: (g, r, D), bias (g, r).
        save_rows, save_coeffs: whether to return x and s. u is returned if there is an activation.
    """
    compute = compute_dtype(hidden, weights.decode)
    if plan.slots is not None:
        assert not (save_rows or save_coeffs)
        _edit_from_table(hidden, plan, weights, compute)
        return SavedRows()
    encode, bias, decode, subtract, activation = weights
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
        s = u if activation is None else activate(activation, u)
        if subtract:
            s = s - h @ r.T
        edited = h.addmm(s, r) if save_rows and h is x else h.addmm_(s, r)
        place.write(hidden, edited.to(hidden.dtype))
        if save_rows:
            saved_x.append(x)
        if save_coeffs:
            saved_s.append(s)
        if activation is not None:
            saved_u.append(u)
    return SavedRows(_concatenated(saved_x), _concatenated(saved_s), _concatenated(saved_u))


def edit_backward(
    grad_out: Tensor,
    plan: RowPlan,
    weights: EditWeights,
    saved: SavedRows,
    wanted: Wanted,
    *,
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of the edit for upstream v = ``grad_out`` (N, D).

        ds = v Rᵀ    du = ds · act′(u)    dh = v + du A − σ ds R    dA = duᵀ x    db = Σ du
        dR = sᵀ v − σ dsᵀ x

    Args:
        weights: with a group dimension; the bias is not read.
        overwrite: whether dh may be ``grad_out`` itself with its edited rows rewritten. If not, dh
            is a new tensor, because autograd owns ``grad_out``.

    Returns:
        dh (N, D), dA (g, r, D), db (g, r) and dR (g, r, D), None where not wanted.
    """
    encode, _, decode, subtract, activation = weights
    compute = compute_dtype(grad_out, decode)
    d_hidden = None
    if wanted.hidden:
        d_hidden = grad_out if overwrite else grad_out.clone(memory_format=torch.contiguous_format)
    grads: tuple[list[Tensor], ...] = ([], [], [])
    for k, place in enumerate(plan.places):
        x, s, u = (
            None if value is None else value[plan.offsets[k] : plan.offsets[k + 1]]
            for value in saved
        )
        v, r = place.read(grad_out).to(compute), decode[k].to(compute)
        ds = v @ r.T
        du = ds if u is None else activation_grad(activation, u, ds)
        if wanted.encode:
            assert x is not None
            grads[0].append(du.T @ x.to(compute))
        if wanted.bias:
            grads[1].append(du.sum(0))
        if wanted.decode:
            assert s is not None
            outer = s.T @ v
            if subtract:
                assert x is not None
                outer = outer.addmm(ds.T, x.to(compute), alpha=-1)
            grads[2].append(outer)
        if d_hidden is not None and encode is not None:
            # v is a copy, and this is its last use.
            dh = v.addmm_(du, encode[k].to(compute))
            if subtract:
                dh = dh.addmm_(ds, r, alpha=-1)
            place.write(d_hidden, dh.to(d_hidden.dtype))
    d_encode, d_bias, d_decode = (
        torch.stack(parts).to(decode.dtype) if parts else None for parts in grads
    )
    return d_hidden, d_encode, d_bias, d_decode


def _edit_from_table(
    hidden: Tensor, plan: RowPlan, weights: EditWeights, compute: torch.dtype
) -> None:
    """Run :func:`edit_forward` with entries of tables (E, r, D).

    Groups of one size share a batched product, whatever entries they use. So the number of calls
    does not grow with the number of adapters.
    """
    assert plan.slots is not None
    encode, bias, decode, subtract, activation = weights
    for (first, last), place in zip(plan.runs, plan.run_places, strict=True):
        entry = plan.slots[first:last].clamp(min=0)

        def gather(table: Tensor, entry: Tensor = entry) -> Tensor:
            return table.index_select(0, entry).to(compute)

        h = place.read(hidden).to(compute).view(last - first, -1, hidden.shape[-1])
        r = gather(decode)
        if encode is None:
            assert bias is not None
            u = gather(bias).unsqueeze(1).expand(-1, h.shape[1], -1)
        elif bias is None:
            u = h @ gather(encode).mT
        else:
            u = torch.baddbmm(gather(bias).unsqueeze(1), h, gather(encode).mT)
        s = u if activation is None else activate(activation, u)
        if subtract:
            s = s - h @ r.mT
        if plan.scales is not None:
            s = s * plan.scales[first:last].to(compute).view(-1, 1, 1)
        edited = torch.baddbmm(h, s, r)
        place.write(hidden, edited.view(-1, hidden.shape[-1]).to(hidden.dtype))


def compute_dtype(hidden: Tensor, parameter: Tensor) -> torch.dtype:
    """Return the dtype of the sums: float64 if either tensor is float64, else float32."""
    return torch.promote_types(torch.promote_types(hidden.dtype, parameter.dtype), torch.float32)


def _concatenated(parts: list[Tensor]) -> Tensor | None:
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)
