"""Three optimizer steps of a tiny Llama's adapter, in one process or on one of several ranks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import LAYERS, PAD, VOCAB, llama
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments

from reft import ReftConfig, ReftTrainer, get_reft_model

#: Sequences in a batch, over all ranks.
BATCH = 4

STEPS = 3


@dataclass(frozen=True)
class Case:
    """Differences from the plain training.

    Attributes:
        arguments: of TrainingArguments.
        config: of the adapter.
        lora: whether PEFT trains LoRA on two of the base's layers as well.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    lora: bool = False


CASES = {
    "plain": Case(),
    "checkpointing": Case({"gradient_checkpointing": True}),
    "reentrant": Case(
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        }
    ),
    "clipping": Case({"max_grad_norm": 0.1}),
    "accumulation": Case({"gradient_accumulation_steps": 2}),
    "last layers, untied": Case(config={"layers": [1, 2], "tied": False}),
    "direft": Case(config={"intervention": "direft"}),
    "head": Case(config={"modules_to_save": ("lm_head",)}),
    "lora": Case(lora=True),
}


def features(number: int) -> list[dict[str, list[int]]]:
    """Make sequences of 5 to 14 tokens with prompts of 3 to 6; every fourth pair has no prompt, so
    that the rank that gets it has nothing to edit."""
    draw = random.Random(7)
    made = []
    for index in range(number):
        length = draw.randint(5, 14)
        prompt = 0 if index % 8 in (6, 7) else draw.randint(3, min(6, length - 1))
        ids = [draw.randrange(3, VOCAB) for _ in range(length)]
        made.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * length,
                "labels": [-100] * prompt + ids[prompt:],
            }
        )
    return made


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Pad on the right."""
    size = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [value] * (size - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def whole(value: Tensor) -> Tensor:
    """Copy a tensor that may be sharded; every rank must call this."""
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().clone()


class Gradients(TrainerCallback):
    """Records the gradients that the optimizer receives in each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = {
            short(name): whole(parameter.grad)
            for name, parameter in kwargs["model"].named_parameters()
            if parameter.requires_grad and parameter.grad is not None
        }
        self.steps.append(gradients)


def short(name: str) -> str:
    """Strip the prefixes of wrappers from a parameter's name."""
    for part in ("module.", "base_model.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name


class InOrder(ReftTrainer):
    """A trainer that does not shuffle, so that any number of ranks sees the same batches."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def make_base() -> LlamaForCausalLM:
    """Build the base, which is equal in every process."""
    return llama(initializer_range=0.05)


def make_trainer(
    case: Case,
    folder: Path,
    *,
    rank: int = 0,
    ranks: int = 1,
    base: nn.Module | None = None,
) -> InOrder:
    """Build a trainer of a new adapter; every rank draws another initialisation."""
    base = make_base() if base is None else base
    torch.manual_seed(100 + rank)
    if case.lora:
        base = get_peft_model(
            base, LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"])
        )
    generator = torch.Generator().manual_seed(100 + rank)
    model = get_reft_model(base, config_of(case), generator=generator)
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // ranks,
        "learning_rate": 2e-3,
        # AdamW divides each gradient by its size, which would magnify the rounding of tiny ones.
        "adam_epsilon": 1e-3,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **case.arguments,
    }
    number = BATCH * settings["max_steps"] * settings.get("gradient_accumulation_steps", 1)
    return InOrder(
        model,
        TrainingArguments(output_dir=str(folder), **settings),
        data_collator=collate,
        train_dataset=features(number),
        eval_dataset=features(BATCH),
        callbacks=[Gradients()],
    )


def config_of(case: Case) -> ReftConfig:
    """Build the configuration: three blocks, two tokens at each end."""
    return ReftConfig(
        **{"rank": 4, "positions": "f2+l2", "layers": list(range(LAYERS)), **case.config}
    )


def trained(trainer: InOrder, **how: Any) -> dict[str, Any]:
    """Train and return losses, gradient norms, gradients and weights, equal on all ranks."""
    trainer.train(**how)
    [watch] = [
        callback
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, Gradients)
    ]
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "norms": [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row],
        "gradients": watch.steps,
        "weights": weights_of(trainer.model),
    }


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Gather the trainable parameters."""
    return {
        short(name): whole(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return max |left − right| over all tensors; the names must be equal."""
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def batch(number: int) -> dict[str, Tensor]:
    """Collate the first features into one batch."""
    return collate(features(number))
