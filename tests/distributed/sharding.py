"""FSDP2 on the CPU, where accelerate would silently train with DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from three_steps import Case, InOrder, make_base, make_trainer
from torch import nn
from torch.distributed.fsdp import FSDPModule


def shard(trainer: InOrder, **settings: Any) -> InOrder:
    """Configure a trainer for FSDP2, as TrainingArguments(fsdp=…) does on a GPU."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        **{
            "fsdp_version": 2,
            "auto_wrap_policy": "transformer_based_wrap",
            "cpu_ram_efficient_loading": False,
            "state_dict_type": "SHARDED_STATE_DICT",
            **settings,
        }
    )
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    trainer.accelerator.state.fsdp_plugin = plugin
    trainer.is_fsdp_enabled = True
    return trainer


def forget() -> None:
    """Let the next trainer choose its engine anew."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def native_trainer(case: Case, base: Path, folder: Path, **how: Any) -> InOrder:
    """Build a trainer of an adapter on a base that transformers sharded during loading."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    sharded = LlamaForCausalLM.from_pretrained(
        base, distributed_config=DistributedConfig(fsdp_size=how["ranks"])
    )
    return make_trainer(case, folder, base=sharded.eval(), **how)


def units(model: nn.Module) -> int:
    """Count the modules that FSDP gathers separately."""
    return sum(isinstance(module, FSDPModule) for module in model.modules())


def units_of_bare_base(trainer: InOrder) -> int:
    """Count the FSDP units of the base without an adapter, under the trainer's settings."""
    base = make_base()
    optimizer = torch.optim.SGD(base.parameters(), lr=0.0)
    return units(trainer.accelerator.prepare(base, optimizer)[0])
