"""Who learns: the family of edits, LoRA, full finetuning, the head alone.

Each gets the best of four learning rates, three apart by half a power of ten, around what is usual
for it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.learning.tasks import Learning
from reft import get_reft_model


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        title: for people.
        prepare: (base model, task) -> what is trained; the base may be changed.
        rates: learning rates that are tried.
        equation: of a member of the family.
    """

    title: str
    prepare: Callable[[PreTrainedModel, Learning], nn.Module]
    rates: tuple[float, ...]
    equation: str = ""


_EDIT_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def _edit(member: str) -> Callable[[PreTrainedModel, Learning], nn.Module]:
    def prepare(base: PreTrainedModel, task: Learning) -> nn.Module:
        return get_reft_model(base, dataclasses.replace(task.edit, intervention=member))

    return prepare


def _lora(all_linear: bool) -> Callable[[PreTrainedModel, Learning], nn.Module]:
    def prepare(base: PreTrainedModel, task: Learning) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        targets = task.linear if all_linear else task.attention
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=list(targets),
            exclude_modules=list(task.beside) or None,
            task_type=task.peft_task,
        )
        return get_peft_model(base, config)

    return prepare


def _full(base: PreTrainedModel, task: Learning) -> nn.Module:
    for one in base.parameters():
        one.requires_grad_(True)
    return base


def _head(base: Any, task: Learning) -> nn.Module:
    for one in base.parameters():
        one.requires_grad_(False)
    head = base.get_submodule(task.head)
    if any(one is base.get_input_embeddings().weight for one in head.parameters()):
        # Tied to the embeddings, which are no head: the head gets weights of its own.
        head.weight = nn.Parameter(copy.deepcopy(head.weight.detach()))
    for one in head.parameters():
        one.requires_grad_(True)
    return base


def trained_parameters(model: nn.Module) -> int:
    """Entries that are trained."""
    return sum(one.numel() for one in model.parameters() if one.requires_grad)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "loreft": Method("LoReFT", _edit("loreft"), _EDIT_RATES, "h + Rᵀ(Wh + b − Rh)"),
        "direft": Method("DiReFT", _edit("direft"), _EDIT_RATES, "h + W₂ᵀ(W₁h + b)"),
        "noreft": Method("NoReFT", _edit("noreft"), _EDIT_RATES, "h + W₂ᵀ(W₁h + b − W₂h)"),
        "direft_orthonormal": Method(
            "DiReFT, orthonormal", _edit("direft_orthonormal"), _EDIT_RATES, "h + Rᵀ(Wh + b)"
        ),
        "consreft": Method("ConsReFT", _edit("consreft"), _EDIT_RATES, "h + Rᵀ(b − Rh)"),
        "lobireft": Method("LobiReFT", _edit("lobireft"), _EDIT_RATES, "h + Rᵀb"),
        "lora": Method("LoRA, r 8, q and v", _lora(False), (3e-4, 1e-3, 3e-3, 1e-2)),
        "lora_all": Method("LoRA, r 8, all linear", _lora(True), (3e-4, 1e-3, 3e-3, 1e-2)),
        "full": Method("full finetuning", _full, (3e-5, 1e-4, 3e-4, 1e-3)),
        "head": Method("the head alone", _head, (1e-3, 3e-3, 1e-2, 3e-2)),
    }
)

#: The members of the family, in the order of the paper's Table 17, with its scores: averages over
#: four sets of arithmetic problems on LLaMA-7B.
FAMILY: Mapping[str, float] = MappingProxyType(
    {
        "lobireft": 31.3,
        "consreft": 37.1,
        "direft_orthonormal": 42.9,
        "noreft": 42.4,
        "direft": 40.6,
        "loreft": 42.6,
    }
)


def seeded(seed: int) -> None:
    """Before anything is drawn."""
    torch.manual_seed(seed)
