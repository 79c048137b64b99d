"""Broadcasting adapters from one rank to all others, in a distributed run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from reft.adapter.parameters import AdapterParameters


def world_size() -> int:
    """The number of processes of the run; 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def broadcast_adapters(model: nn.Module, source: int = 0, group: Any = None) -> None:
    """See :meth:`reft.ReftModel.broadcast_adapters`."""
    if world_size() == 1:
        return
    adapters = [module for module in model.modules() if isinstance(module, AdapterParameters)]
    in_adapters = [parameter for adapter in adapters for parameter in adapter.parameters()]
    if any(isinstance(parameter, DTensor) for parameter in in_adapters):
        raise RuntimeError(
            "broadcast_adapters must be called before the adapter is sharded; each rank has only "
            "a shard of it now"
        )
    for adapter in adapters:
        _broadcast_adapter(adapter, source, group)
    broadcast = {id(parameter) for parameter in in_adapters}
    for parameter in _unsharded_trainable_parameters(model):
        if id(parameter) not in broadcast:
            dist.broadcast(parameter.data, src=source, group=group)


def _broadcast_adapter(adapter: AdapterParameters, source: int, group: Any) -> None:
    present = adapter.training_state()
    received = {name: present[name].clone().contiguous() for name in sorted(present)}
    for tensor in received.values():
        dist.broadcast(tensor, src=source, group=group)
    # Equal values are not written: a loaded R is used bit for bit until something is written to it.
    if any(not torch.equal(present[name], received[name]) for name in present):
        adapter.load(received, training_state=True)


def _unsharded_trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters, such as those of PEFT's layers, that no engine has sharded."""
    return [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad
        and not isinstance(parameter, DTensor)
        and not hasattr(parameter, "ds_id")  # DeepSpeed ZeRO 3
    ]
