"""The same adapter on every rank of a run that is started with torchrun."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from reft.adapter.parameters import AdapterParameters

if TYPE_CHECKING:
    from reft.model.reft_model import ReftModel


def world_size() -> int:
    """The number of processes that train together; 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def broadcast_adapters(model: ReftModel, source: int = 0, group: Any = None) -> None:
    """Give every rank the adapters of one, and whatever else is trained; to be called by all ranks,
    before an engine shards the model.

    Ranks that drew their first values from different seeds would train different adapters: FSDP2
    would even put one together from parts of each. DDP mends that by itself. A rank whose values
    are those already keeps its own; outside torch.distributed nothing happens.

    Args:
        source: the rank, of all processes, whose values all get.
        group: the ranks that take part; None for all.

    Raises:
        RuntimeError: the adapter is sharded already. Nothing was changed.
    """
    if world_size() == 1:
        return
    adapters = [one for one in model.modules() if isinstance(one, AdapterParameters)]
    if any(isinstance(one, DTensor) for adapter in adapters for one in adapter.parameters()):
        raise RuntimeError(
            "broadcast_adapters must be called before the adapter is sharded, each rank has a part "
            "of it now"
        )
    in_banks = {id(one) for adapter in adapters for one in adapter.parameters()}
    for adapter in adapters:
        _broadcast_bank(adapter, source, group)
    for parameter in _trained_apart(model):
        if id(parameter) not in in_banks:
            dist.broadcast(parameter.data, src=source, group=group)


def _broadcast_bank(adapter: AdapterParameters, source: int, group: Any) -> None:
    own = adapter.training_state()
    given = {name: own[name].clone().contiguous() for name in sorted(own)}
    for tensor in given.values():
        dist.broadcast(tensor, src=source, group=group)
    # What is equal stays: an R that was loaded is used as it is until something is written.
    if any(not torch.equal(own[name], given[name]) for name in own):
        adapter.load(given, training_state=True)


def _trained_apart(model: nn.Module) -> list[nn.Parameter]:
    """Trained parameters, of heads and of PEFT's layers, that no engine holds in parts."""
    return [
        one
        for one in model.parameters()
        if one.requires_grad and not isinstance(one, DTensor) and not hasattr(one, "ds_id")
    ]
