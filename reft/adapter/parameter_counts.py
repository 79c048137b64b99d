"""How large a model is and how much of it is trained."""

from __future__ import annotations

import torch
from rich.console import Console
from torch import Tensor, nn


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained parameters, all parameters), each one counted once."""
    trained = total = 0
    for parameter in model.parameters():
        number = _entries(parameter)
        total += number
        trained += number if parameter.requires_grad else 0
    return trained, total


def print_parameters(trained: int, total: int) -> None:
    """Print how many parameters are trained, in PEFT's words."""
    Console().print(
        f"trainable params: {trained:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trained / total:.4f}",
        highlight=False,
        soft_wrap=True,
    )


def _entries(parameter: Tensor) -> int:
    """Entries of a parameter, also of one that DeepSpeed has sharded or bitsandbytes has packed."""
    number = parameter.numel()
    if number == 0 and hasattr(parameter, "ds_numel"):
        number = int(parameter.ds_numel)
    if type(parameter).__name__ == "Params4bit":
        number *= 2 * getattr(parameter, "quant_storage", torch.uint8).itemsize
    return number
