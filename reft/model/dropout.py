"""The edit with dropout, for training: gather rows, edit them, apply dropout, add the change."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reft_kernels import RowPlan
from reft_kernels.functional import apply_edit
from reft_kernels.spec import EditWeights


def dropped_edit(
    hidden: Tensor,
    plan: RowPlan,
    weights: EditWeights,
    *,
    p: float,
    on: str,
    in_place: bool,
) -> Tensor:
    """Edit the rows of a plan with dropout.

    With x a row, y its edit and drop(·) dropout scaled by 1/(1 − p):

        on = "delta":  x + drop(y − x)        on = "row":  drop(y), as pyreft does

    The change of x is computed in float32 and rounded to hidden's dtype before it is added.

    Args:
        hidden: (…, D).
        plan: the rows to edit.
        weights: A, b and R of the groups of the rows.
        p: probability of dropping an entry, in [0, 1).
        on: "delta" or "row".
        in_place: write into ``hidden`` if it is contiguous, and return it.
    """
    dim = hidden.shape[-1]
    flat = hidden.reshape(-1, dim)
    rows = plan.rows.clamp(min=0)
    x = flat.index_select(0, rows).to(torch.promote_types(hidden.dtype, torch.float32))
    gathered = RowPlan(torch.arange(plan.num_rows, device=rows.device), plan.offsets, complete=True)
    y = apply_edit(x, gathered, weights)
    change = F.dropout(y, p) - x if on == "row" else F.dropout(y - x, p)
    # Entries −1 of the plan were clamped to row 0: they add zeros there.
    change = change.masked_fill((plan.rows < 0).unsqueeze(1), 0).to(hidden.dtype)
    if in_place and hidden.is_contiguous():
        flat.index_add_(0, rows, change)
        return hidden
    return flat.index_add(0, rows, change).view(hidden.shape)
