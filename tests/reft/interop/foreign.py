"""Fixture folders of other libraries with their logits, and the distance of our logits."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from make_fixtures import FIXTURES
from safetensors import safe_open
from torch import Tensor, nn


@cache
def golden(library: str) -> tuple[dict[str, Tensor], dict]:
    """Read the tensors of ``<library>.safetensors`` and its metadata."""
    with safe_open(FIXTURES / f"{library}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["golden"])


def cases(*libraries: str) -> dict[str, tuple[str, dict]]:
    """Return case -> (library, settings)."""
    return {
        case: (library, made)
        for library in libraries
        for case, made in golden(library)[1]["cases"].items()
    }


def roundings(actual: Tensor, expected: Tensor) -> float:
    """Return max |actual − expected| in units of the last place of the largest expected entry."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((actual - expected).abs().max() / scale / torch.finfo(expected.dtype).eps)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def contents(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Read the tensors of every pickle in a folder, by file name."""
    return {file.name: torch.load(file, weights_only=True) for file in sorted(folder.glob("*.bin"))}


def untouched(model: nn.Module) -> tuple[list[str], list[bool], int]:
    """Return the state that an adapter would change: modules, requires_grad, hooks."""
    return (
        [name for name, _ in model.named_modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    )
