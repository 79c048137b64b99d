"""Reading and writing tensors that an engine may hold in parts, one on each rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Tensor) -> Tensor:
    """All of a tensor, without a graph; of one in parts every rank has to ask."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """Of ``value``, which every rank has whole, what this rank holds of ``like``."""
    if not isinstance(like, DTensor):
        return value
    # Without a source nothing is sent: each rank cuts its own part.
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """``target.copy_(value)``, of this rank's part if ``target`` is in parts."""
    target.copy_(part_of(value, target))
