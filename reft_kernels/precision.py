"""The precision of what is computed: float32 or wider, whatever surrounds it."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in, for inputs of these dtypes: float32 or wider."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Switch autocast off inside an autocast region of this device type."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
