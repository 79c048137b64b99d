"""Whether an adapter still has the values that were drawn for it."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from reft.adapter.parameters import AdapterParameters
from reft.adapter.sharding import in_parts


def mark_fresh(adapter: nn.Module) -> None:
    """Remember the values of a bank, or of the parts of one, as drawn and nothing else yet."""
    for bank in _banks(adapter):
        bank.fresh = _digest(bank)


def is_fresh(adapter: nn.Module) -> bool:
    """Whether the values are those that :func:`mark_fresh` saw, and nobody has set them since."""
    return all(bank.fresh is not None and bank.fresh == _digest(bank) for bank in _banks(adapter))


@torch.no_grad()
def _digest(bank: AdapterParameters) -> bytes | None:
    """Of all numbers, on whatever device; None where this process has not all of them."""
    tensors = [*bank.parameters(), *([] if bank.base is None else [bank.base])]
    if any(one.is_meta or in_parts(one) for one in tensors):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for one in tensors:
        digest.update(one.detach().double().cpu().contiguous().numpy().tobytes())
    return digest.digest()


def _banks(adapter: nn.Module) -> list[AdapterParameters]:
    return [one for one in adapter.modules() if isinstance(one, AdapterParameters)]
