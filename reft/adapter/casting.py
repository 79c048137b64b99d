"""Casts of a model that keep the precision of its adapters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def can_represent(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether ``wide`` has every number of ``narrow``; both are floating-point dtypes."""
    outer, inner = torch.finfo(wide), torch.finfo(narrow)
    return outer.eps <= inner.eps and outer.max >= inner.max and outer.tiny <= inner.tiny


def apply_keeping_precision(
    function: Callable[[Tensor], Tensor], tensor: Tensor, dtype: torch.dtype
) -> Tensor:
    """Move or cast a tensor as ``nn.Module.to`` and its like do, without losing precision.

    Args:
        function: moves or casts a tensor.
        tensor: of a floating-point dtype.
        dtype: the least precision of the result. If ``function`` casts to a dtype that cannot
            represent all numbers of this one, only the device of its result is used.

    Returns:
        The tensor on the device where ``function`` put it.
    """
    moved = function(tensor)
    is_cast = moved.dtype != tensor.dtype and moved.is_floating_point()
    if not is_cast or can_represent(moved.dtype, dtype):
        return moved
    return tensor.to(device=moved.device, dtype=dtype)
