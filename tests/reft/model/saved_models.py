"""A small adapter away from its initialisation, for tests of saving and loading."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import llama, moved, tokens
from torch import Tensor, nn

from reft import ReftConfig, ReftModel, get_reft_model

IDS = tokens(2, 7)
CONFIG = ReftConfig(rank=3, positions="f2+l2")


def wrapped(base: nn.Module | None = None, config: ReftConfig = CONFIG, seed: int = 3) -> ReftModel:
    base = llama() if base is None else base
    torch.manual_seed(seed)
    return moved(get_reft_model(base, config), 0.1)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
