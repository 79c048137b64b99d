"""Counts of the parameters of a model."""

from __future__ import annotations

import torch
from rich.console import Console
from torch import Tensor, nn


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count (trainable parameters, all parameters); shared ones count once."""
    trainable = total = 0
    for parameter in model.parameters():
        size = _size(parameter)
        total += size
        trainable += size if parameter.requires_grad else 0
    return trainable, total


def print_parameters(trainable: int, total: int) -> None:
    """Print the number of trainable parameters in PEFT's format."""
    Console().print(
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trainable / total:.4f}",
        highlight=False,
        soft_wrap=True,
    )


def _size(parameter: Tensor) -> int:
    """Count the entries of a parameter that DeepSpeed may shard or bitsandbytes may pack."""
    size = parameter.numel()
    if size == 0 and hasattr(parameter, "ds_numel"):
        size = int(parameter.ds_numel)
    if type(parameter).__name__ == "Params4bit":
        size *= 2 * getattr(parameter, "quant_storage", torch.uint8).itemsize
    return size
