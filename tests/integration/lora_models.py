"""Tiny models with PEFT's LoRA layers under an adapter of this library."""

from __future__ import annotations

import pytest
import torch
from tiny_models import bert, gpt2, llama, tokens

from reft import ReftConfig

peft = pytest.importorskip("peft")

IDS = tokens(3, 9)
LABELS = IDS.clone()
for _row, _n in enumerate((6, 5, 2)):
    LABELS[_row, :_n] = -100
SPANS = [(0, 6), (0, 5), (0, 2)]

#: base -> (constructor, LoRA's target modules, PEFT's task type).
BASES = {
    "llama": (llama, ["q_proj", "down_proj"], "CAUSAL_LM"),
    "gpt2": (gpt2, ["c_attn"], "CAUSAL_LM"),
    "bert": (bert, ["query", "output.dense"], "FEATURE_EXTRACTION"),
}
ORDERS = ("wrapper", "task", "transformers")


def with_lora(order: str, base: str = "llama", model=None, seed: int = 7, **changes):
    """Put LoRA with random weights on a base: in PeftModel, in the wrapper of a task, or by
    transformers."""
    make, targets, task = BASES[base]
    model = make() if model is None else model
    settings = {"r": 2, "target_modules": targets, "init_lora_weights": False, **changes}
    if base == "gpt2":
        settings["fan_in_fan_out"] = True
    torch.manual_seed(seed)
    if order == "transformers":
        try:
            model.add_adapter(peft.LoraConfig(**settings))
        except ValueError as error:  # transformers may require a PEFT that is not released yet
            if "version of PEFT" not in str(error):
                raise
            pytest.skip(str(error))
        return model
    if order == "task":
        settings["task_type"] = task
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 3, "positions": "f2+l2", "tied": False, **changes})


def trained(model) -> dict[str, torch.nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def kinds(model) -> set[str]:
    return {
        "lora" if "lora_" in name else "reft" if ".reft." in name else "base"
        for name in trained(model)
    }


def logits(model, **inputs):
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def logits_of(model, ids, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits
