"""Activations by name: PyTorch functions, and the names that the Triton kernels implement.

Where ``transformers.activations.ACT2FN`` has the same function, the names agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

#: name -> elementwise function. ``gelu`` is the exact (erf) version.
ACTIVATIONS: MappingProxyType[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "relu": torch.relu,
        "gelu": F.gelu,
        "silu": F.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
        "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "laplace": lambda x: 0.5 + 0.5 * torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))),
        "hardswish": F.hardswish,
        "relu2": lambda x: torch.relu(x).square(),
        "elu": F.elu,
        "leaky_relu": F.leaky_relu,
        "mish": F.mish,
        "relu6": F.relu6,
        "softplus": F.softplus,
    }
)

#: transformers' other names for the same functions; None is the identity.
ALIASES: MappingProxyType[str, str | None] = MappingProxyType(
    {
        "linear": None,
        "swish": "silu",
        "gelu_python": "gelu",
        "gelu_pytorch_tanh": "gelu_new",
        "gelu_python_tanh": "gelu_new",
        "gelu_fast": "gelu_new",
        "gelu_accurate": "gelu_new",
    }
)

#: The names that ``_triton/primitives.py`` implements.
TRITON_ACTIVATIONS = frozenset({"relu", "gelu", "silu", "tanh"})


def activate(name: str | None, u: Tensor) -> Tensor:
    """Compute ``act(u)``; the identity for None."""
    return u if name is None else ACTIVATIONS[name](u)


def activation_grad(name: str | None, u: Tensor, grad: Tensor) -> Tensor:
    """Compute ``grad * act'(u)`` by PyTorch's own derivative of the named function."""
    if name is None:
        return grad
    # torch.compile traces this, but not torch.autograd.grad.
    pullback = torch.func.vjp(ACTIVATIONS[name], u)[1]
    result: Tensor = pullback(grad)[0]
    return result
