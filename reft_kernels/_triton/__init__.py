"""The Triton kernels. Importing this package does not import triton; importing ``launch`` does."""

from __future__ import annotations

import os
from importlib.util import find_spec

# Located without importing it.
_INSTALLED = find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter. Triton reads the variable when a kernel is
    decorated, so it must be set before the first edit."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(device_type: str) -> str | None:
    """Return the reason why the kernels cannot run on this kind of device, or None."""
    if not _INSTALLED:
        return "triton is not installed"
    if device_type != "cuda" and not (device_type == "cpu" and interpreted()):
        return f"hidden is on {device_type}; the kernels need CUDA or ROCm, or TRITON_INTERPRET=1"
    return None
