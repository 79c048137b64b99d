"""Reading and writing of tensors that FSDP2 or DeepSpeed ZeRO-3 may have sharded over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a shard of this tensor."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor, without a graph. If it is sharded, every rank must call this."""
    if hasattr(tensor, "ds_id"):
        with gathered(tensor):
            return tensor.detach().clone()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


@contextmanager
def gathered(*tensors: Tensor, written: bool = False) -> Iterator[None]:
    """Gather the parameters that DeepSpeed has sharded, while the context is entered. Every rank
    must enter it.

    Args:
        tensors: any tensors; those that are not sharded stay as they are.
        written: keep on every rank what rank 0 writes inside.
    """
    sharded = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if written else None):
        yield


def local_shard(value: Tensor, like: Tensor) -> Tensor:
    """Shard ``value``, which every rank holds in full, as ``like`` is sharded."""
    if not isinstance(like, DTensor):
        return value
    # Without a source nothing is sent: each rank cuts its shard from its copy.
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


@torch.no_grad()
def copy_full_tensor(target: Tensor, value: Tensor) -> None:
    """Copy ``value``, which every rank holds in full, into ``target``, which may be sharded."""
    with gathered(target, written=True):
        target.copy_(local_shard(value, target))
