"""Reference implementation in plain PyTorch: any device, any float, gradients by autograd.

It defines the meaning of the operator; everything else in this package is measured against it. It
may synchronise and allocate. It computes in the widest of float32 and the given dtypes, adds the
edit there and rounds once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels.activations import activate
from reft_kernels.rows import RowPlan


def lowrank_edit(
    hidden: Tensor,
    plan: RowPlan,
    encode: Tensor | None,
    bias: Tensor | None,
    decode: Tensor,
    *,
    subtract: bool = False,
    activation: str | None = None,
) -> Tensor:
    """Compute ``h' = h + Rᵀ(act(W h + b) − σ R h)`` on the rows of the plan, in a new tensor.

    Args:
        hidden: (…, D).
        plan: the rows, by group.
        encode: W, (r, D) or (g, r, D), or None for no learned projection.
        bias: b, (r,) or (g, r), or None for zero.
        decode: R, (r, D) or (g, r, D).
        subtract: σ = 1.
        activation: a name of ``activations.ACTIVATIONS`` or None.
    """
    dim = hidden.shape[-1]
    compute = torch.promote_types(torch.promote_types(hidden.dtype, decode.dtype), torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        w, b, r = (
            _with_groups(parameter, dims, compute)
            for parameter, dims in ((encode, 3), (bias, 2), (decode, 3))
        )
        assert r is not None
        flat = hidden.reshape(-1, dim)
        out = flat
        for k in range(plan.num_groups):
            rows = plan.rows[plan.offsets[k] : plan.offsets[k + 1]]
            rows = rows[rows >= 0]
            entry = k if plan.slots is None else int(plan.slots[k])
            if entry < 0:
                continue
            h = flat[rows].to(compute)
            u = h.new_zeros(h.shape[0], r.shape[1])
            if w is not None:
                u = u + h @ w[entry].T
            if b is not None:
                u = u + b[entry]
            s = activate(activation, u)
            if subtract:
                s = s - h @ r[entry].T
            if plan.scales is not None:
                s = s * plan.scales[k]
            out = out.index_copy(0, rows, (h + s @ r[entry]).to(hidden.dtype))
    return out.clone().reshape(hidden.shape) if out is flat else out.reshape(hidden.shape)


def loreft(hidden: Tensor, plan: RowPlan, rotation: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute ``h' = h + Rᵀ(W h + b − R h)``, equation 2 of arXiv 2404.03592; R is ``rotation``."""
    return lowrank_edit(hidden, plan, weight, bias, rotation, subtract=True)


def _with_groups(parameter: Tensor | None, dims: int, dtype: torch.dtype) -> Tensor | None:
    """Return the parameter in ``dtype`` with its group dimension, with which it has ``dims``."""
    if parameter is None:
        return None
    return (parameter if parameter.ndim == dims else parameter.unsqueeze(0)).to(dtype)
