"""Whether an adapter still has its initialisation."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from reft.adapter.parameters import AdapterParameters
from reft.adapter.sharding import is_sharded


def mark_untrained(adapter: nn.Module) -> None:
    """Record that the values of an adapter are its initialisation."""
    for part in _parts(adapter):
        part.initial_digest = _digest(part)


def is_untrained(adapter: nn.Module) -> bool:
    """Whether the values are those that :func:`mark_untrained` recorded, and were not assigned or
    loaded since."""
    return all(
        part.initial_digest is not None and part.initial_digest == _digest(part)
        for part in _parts(adapter)
    )


@torch.no_grad()
def _digest(part: AdapterParameters) -> bytes | None:
    """Hash all values; None if this process does not hold all of them."""
    tensors = [*part.parameters(), *([] if part.base is None else [part.base])]
    if any(tensor.is_meta or is_sharded(tensor) for tensor in tensors):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().double().cpu().contiguous().numpy().tobytes())
    return digest.digest()


def _parts(adapter: nn.Module) -> list[AdapterParameters]:
    return [module for module in adapter.modules() if isinstance(module, AdapterParameters)]
