"""FSDP2 for a frozen base with an adapter, under accelerate and transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_accelerate_available

from reft.adapter import sharding
from reft.adapter.parameters import AdapterParameters
from reft.adapter.sharding import full_tensor, local_shard
from reft.model.distributed import broadcast_adapters
from reft.model.reft_model import ReftModel

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 or ZeRO-3 has sharded parameters of this model."""
    return any(map(sharding.is_sharded, model.parameters()))


#: An attribute of Trainers that can train a base which transformers sharded while loading it.
_TRAINS_SHARDED = "is_distributed_loading_by_transformers"

#: The oldest version of accelerate known to keep existing FSDP units.
_KEEPS_UNITS = "1.15.0"


def before_training(model: ReftModel, trainer: Trainer) -> None:
    """Broadcast the adapter of rank 0, and shard it in FSDP units without mixed precision if the
    base has mixed precision.

    Raises:
        ValueError: FSDP1; mixed precision with a version of accelerate that would round the adapter
            too; reentrant checkpointing with wrong gradients under DDP; or a base that is sharded
            already, which this version's Trainer would wrap with DDP.
    """
    adapters = [module for module in model.modules() if isinstance(module, AdapterParameters)]
    if any(map(is_sharded, adapters)):
        return  # an earlier call of train() has prepared it
    native = getattr(trainer, _TRAINS_SHARDED, None)
    if is_sharded(model) and not (native or trainer.is_deepspeed_enabled):
        if native is not None:
            raise ValueError(
                "model must not be sharded before the Trainer gets it, except by from_pretrained("
                "distributed_config=…): the Trainer would give the ranks of one model different "
                "data; let accelerate's FSDP2 or DeepSpeed shard it, or write the training loop"
            )
        raise ValueError(
            "model must not be sharded by from_pretrained(distributed_config=…) for the Trainer of "
            f"transformers {version('transformers')}; upgrade transformers, or load the base "
            "unsharded and let accelerate's FSDP2 (fsdp_version=2) shard it"
        )
    broadcast_adapters(model)
    accelerator = trainer.accelerator
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        _refuse_reentrant(trainer.args)
        return
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version must be 2, got {plugin.fsdp_version}: FSDP1 flattens frozen and "
            "trainable parameters into one"
        )
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.param_dtype not in (None, torch.float32):
        if not is_accelerate_available(_KEEPS_UNITS):
            raise ValueError(
                "mixed_precision under FSDP2 would round the adapter with the installed version of "
                f"accelerate; upgrade it to {_KEEPS_UNITS}, or load the base in bfloat16 and leave "
                "mixed_precision off"
            )
        # accelerate has one policy for the whole model, but it keeps units that exist already.
        mesh = accelerator.torch_device_mesh
        mesh_argument = {} if mesh is None else {"mesh": mesh}
        for adapter in adapters:
            fully_shard(adapter, mp_policy=MixedPrecisionPolicy(), **mesh_argument)


def _refuse_reentrant(args: TrainingArguments) -> None:
    """Refuse reentrant checkpointing under DDP where it recomputes edits: each recomputed edit runs
    a nested backward, and DDP averages gradients after the first of them."""
    options = args.gradient_checkpointing_kwargs
    reentrant = isinstance(options, dict) and options.get("use_reentrant")
    recomputes_edits = "__call__" in vars(GradientCheckpointingLayer)
    if args.world_size > 1 and args.gradient_checkpointing and reentrant and recomputes_edits:
        raise ValueError(
            "gradient_checkpointing_kwargs must have use_reentrant=False in several processes with "
            f"transformers {version('transformers')}, whose checkpointing recomputes edits: DDP "
            "would average incomplete gradients"
        )


def gather_trainable(
    model: nn.Module, read: Callable[[Tensor], Tensor] = full_tensor
) -> dict[str, Tensor]:
    """Return the full tensors of trainable parameters and buffers by name.

    Every rank must call this.

    Args:
        model: the sharded model.
        read: the function that returns the full tensor of a shard.
    """
    named = model.named_parameters(remove_duplicate=False)  # tied weights under all their names
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    state = model.state_dict(keep_vars=True)
    return {name: read(tensor) for name, tensor in state.items() if name not in frozen}


def gather_optimizer(optimizer: Any) -> dict[str, Any]:
    """Return the unsharded ``optimizer.state_dict()``; every rank must call this."""
    state = optimizer.state_dict()
    full = {key: _map_tensors(full_tensor, values) for key, values in state["state"].items()}
    return {**state, "state": full}


def scatter_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load the result of :func:`gather_optimizer` into an optimizer on any number of ranks."""
    parameters = [tensor for group in optimizer.param_groups for tensor in group["params"]]

    def shard(key: int, value: Tensor) -> Tensor:
        like = parameters[key]
        return local_shard(value, like) if value.shape == like.shape else value

    shards = {
        key: _map_tensors(partial(shard, key), values) for key, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shards})


def _map_tensors(function: Callable[[Tensor], Tensor], values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: function(value) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
