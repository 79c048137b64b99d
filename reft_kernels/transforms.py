"""Detect code that PyTorch transforms, where only PyTorch's own operators may run.

Transforms of ``torch.func`` (grad, jvp, vmap, …) pass tensors that stand for others, and
forward-mode differentiation attaches a tangent to a tensor. A kernel sees neither.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def active() -> bool:
    """Whether this code, or the code being traced, runs within a transform of ``torch.func`` or
    forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def batched(grad: Tensor) -> bool:
    """Whether ``grad`` holds a batch of gradients, made by ``is_grads_batched=True``."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)
