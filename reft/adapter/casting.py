"""The precision of an adapter, whatever its model is cast to and whatever surrounds it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What R and A are made in, of parameters of ``dtype``: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """R is orthonormal and A exact in float32 only, whatever precision surrounds the model."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of a floating-point dtype is one of another."""
    ours, theirs = torch.finfo(wide), torch.finfo(narrow)
    return ours.eps <= theirs.eps and ours.max >= theirs.max and ours.tiny <= theirs.tiny


def applied(function: Callable[[Tensor], Tensor], tensor: Tensor, least: torch.dtype) -> Tensor:
    """``function(tensor)``, as ``nn.Module.to`` and its like have it, with every number kept.

    Args:
        function: moves or casts.
        tensor: of a floating-point dtype.
        least: a dtype that the result of a cast can hold every number of; where it could not, what
            comes out is the tensor in this dtype, on the device where ``function`` put it.
    """
    moved = function(tensor)
    if moved.dtype == tensor.dtype or not moved.is_floating_point() or holds(moved.dtype, least):
        return moved
    return tensor.to(device=moved.device, dtype=least)
