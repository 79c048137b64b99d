"""Looking at data without moving the random numbers that a run draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Inside, random numbers of Python, numpy and torch may be drawn; behind, none was.

    Args:
        device: whose random numbers are kept, beside those of the CPU.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  what data draw from
    on_device = device.type not in ("cpu", "meta", "mps")
    devices = [device.index or 0] if on_device else []
    kind = device.type if on_device else "cuda"
    with torch.random.fork_rng(devices, device_type=kind):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
