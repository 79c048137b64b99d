"""Loss and greedy generation of a model with the interface of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def loss_of(model: Any) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A function that maps a batch to the loss of the model."""

    def compute_loss(batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    return compute_loss


def greedy_generation(model: Any, *, mask: bool = True) -> Callable[[Tensor, int], Tensor]:
    """A function that maps (prompt ids, number of new tokens) to sequences.

    Args:
        mask: pass an attention mask of ones; otherwise the model infers it.
    """

    def generate(prompts: Tensor, count: int) -> Tensor:
        inputs = {"attention_mask": torch.ones_like(prompts)} if mask else {}
        tokens: Tensor = model.generate(
            input_ids=prompts, **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        return tokens

    return generate
