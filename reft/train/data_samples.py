"""Samples of a data set, read without changing the random numbers that training draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserve_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random states of Python, numpy and torch on exit.

    Args:
        device: the device whose generator is restored besides the one of the CPU.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  data sets use these
    on_device = device.type not in ("cpu", "meta", "mps")
    devices = [device.index or 0] if on_device else []
    kind = device.type if on_device else "cuda"
    with torch.random.fork_rng(devices, device_type=kind):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def spread_indices(length: int, most: int) -> list[int]:
    """Return at most ``most`` indices of a sequence in order, spread over its whole length."""
    count = min(length, most)
    return [index * length // count for index in range(count)]
