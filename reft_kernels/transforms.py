"""Whether PyTorch looks through what runs: then it must be PyTorch's own operators.

Transforms of ``torch.func`` (grad, jvp, vmap, …) hand on tensors that stand for others, and
forward-mode differentiation hangs a tangent on a tensor. A kernel sees neither.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def active() -> bool:
    """Whether a transform of ``torch.func`` or a level of forward-mode differentiation is entered,
    here or in the code that is traced."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def batched(grad: Tensor) -> bool:
    """Whether ``grad`` is many in one, as ``autograd.grad(is_grads_batched=True)`` makes it."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)
