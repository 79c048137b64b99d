"""What FSDP2 has to be told of a frozen base with an adapter, under accelerate and transformers."""

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
    """Whether FSDP2 or ZeRO-3 holds parameters of this model in parts."""
    return any(map(sharding.is_sharded, model.parameters()))


#: What a Trainer is that can train a base which transformers sharded while it loaded it.
_TRAINS_SHARDED = "is_distributed_loading_by_transformers"

#: The version of accelerate that is known to leave units alone which it finds.
_KEEPS_UNITS = "1.15.0"


def before_training(model: ReftModel, trainer: Trainer) -> None:
    """One adapter on all ranks, in units of its own where the base computes in less precision.

    Raises:
        ValueError: FSDP1, or less precision by a version of accelerate that would round the adapter
            too; reentrant checkpointing that would be wrong; a base that is sharded already, which
            this transformers' Trainer would put DDP around.
    """
    adapters = [one for one in model.modules() if isinstance(one, AdapterParameters)]
    if any(map(is_sharded, adapters)):
        return  # trained before
    native = getattr(trainer, _TRAINS_SHARDED, None)
    if is_sharded(model) and not (native or trainer.is_deepspeed_enabled):
        if native is not None:
            raise ValueError(
                "model must not be sharded before a Trainer has it, unless by from_pretrained("
                "distributed_config=…): this one would give its ranks different data; leave it to "
                "accelerate's FSDP2 or DeepSpeed, or write the training loop"
            )
        raise ValueError(
            "model must not be sharded by from_pretrained(distributed_config=…) for the Trainer of "
            f"transformers {version('transformers')}; a later one can train it, and accelerate's "
            "FSDP2, fsdp_version=2, shards a base that was loaded whole"
        )
    broadcast_adapters(model)
    accelerator = trainer.accelerator
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        _refuse_reentrant(trainer.args)
        return
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version must be 2, got {plugin.fsdp_version}: FSDP1 makes one flat parameter of "
            "frozen and trained ones"
        )
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.param_dtype not in (None, torch.float32):
        if not is_accelerate_available(_KEEPS_UNITS):
            raise ValueError(
                "mixed_precision under FSDP2 would round the adapter, which the accelerate that is "
                f"installed cannot leave out, as {_KEEPS_UNITS} can; load the base in bfloat16 and "
                "leave mixed_precision off"
            )
        # One policy is all that accelerate has. A unit that exists is left as it is.
        mesh = accelerator.torch_device_mesh
        own = {} if mesh is None else {"mesh": mesh}
        for adapter in adapters:
            fully_shard(adapter, mp_policy=MixedPrecisionPolicy(), **own)


def _refuse_reentrant(args: TrainingArguments) -> None:
    """Refuse what is silently wrong under DDP: a backward in the backward for each block whose
    edit runs again, of which DDP takes the first for the whole."""
    told = args.gradient_checkpointing_kwargs
    reentrant = isinstance(told, dict) and told.get("use_reentrant")
    runs_edits_again = "__call__" in vars(GradientCheckpointingLayer)
    if args.world_size > 1 and args.gradient_checkpointing and reentrant and runs_edits_again:
        raise ValueError(
            "gradient_checkpointing_kwargs must say use_reentrant=False in several processes with "
            f"transformers {version('transformers')}, whose checkpointing runs edits again: DDP "
            "would average gradients before they are whole"
        )


def gather_trained(
    model: nn.Module, read: Callable[[Tensor], Tensor] = full_tensor
) -> dict[str, Tensor]:
    """name -> whole tensor of what is trained, and of buffers, as ``read`` finds it; to be called
    by every rank."""
    every = model.named_parameters(remove_duplicate=False)  # tied weights under all their names
    frozen = {name for name, one in every if not one.requires_grad}
    state = model.state_dict(keep_vars=True)
    return {name: read(one) for name, one in state.items() if name not in frozen}


def gather_optimizer(optimizer: Any) -> dict[str, Any]:
    """``optimizer.state_dict()`` as one process has it; to be called by every rank."""
    state = optimizer.state_dict()
    return {**state, "state": {key: _each(full_tensor, one) for key, one in state["state"].items()}}


def scatter_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load what :func:`gather_optimizer` returned, on any number of ranks."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]

    def placed(key: int, value: Tensor) -> Tensor:
        like = parameters[key]
        return local_shard(value, like) if value.shape == like.shape else value

    parts = {key: _each(partial(placed, key), one) for key, one in state["state"].items()}
    optimizer.load_state_dict({**state, "state": parts})


def _each(function: Callable[[Tensor], Tensor], values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: function(value) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
