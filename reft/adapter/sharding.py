"""Reading and writing tensors that an engine may hold in parts, one on each rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def in_parts(value: Tensor) -> bool:
    """Whether an engine, FSDP2 or DeepSpeed's ZeRO-3, holds a part of a tensor on each rank."""
    return isinstance(value, DTensor) or hasattr(value, "ds_id")


def whole(value: Tensor) -> Tensor:
    """All of a tensor, without a graph; of one in parts every rank has to ask."""
    if hasattr(value, "ds_id"):
        with gathered(value):
            return value.detach().clone()
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()


@contextmanager
def gathered(*values: Tensor, written: bool = False) -> Iterator[None]:
    """Inside, those of the tensors that DeepSpeed holds in parts are whole; all ranks together.

    Args:
        values: any tensors.
        written: what rank 0 writes inside is kept, on every rank.
    """
    parts = [one for one in values if hasattr(one, "ds_id")]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if written else None):
        yield


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
    with gathered(target, written=True):
        target.copy_(part_of(value, target))
