"""Initialisation of an adapter.

``pyreft`` draws from pyreft's distributions. R is uniform over matrices with orthonormal rows, or
initialised like an ``nn.Linear`` if R is free. W and b are initialised like an ``nn.Linear`` of D
inputs; without W, b is uniform in [0, 1). ``identity`` draws the same values and then replaces some
of them so that the edit is zero: the model starts as its base, bit for bit, and has gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reft_kernels.activations import activate
from reft_kernels.spec import EditSpec


@dataclass(frozen=True)
class InitialValues:
    """Initial values of one adapter, in float32 or wider.

    Attributes:
        rotation: R, (L, g, r, D).
        weight: W, (L, g, r, D), or None.
        bias: b, (L, g, r).
    """

    rotation: Tensor
    weight: Tensor | None
    bias: Tensor

    def select(self, rows: list[int]) -> InitialValues:
        """Select layers by their index in the stack."""
        weight = None if self.weight is None else self.weight[rows]
        return InitialValues(self.rotation[rows], weight, self.bias[rows])


def draw(
    spec: EditSpec,
    shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> InitialValues:
    """Draw initial values from pyreft's distributions.

    Args:
        spec: the row of the family table.
        shape: (L, g, r, D): layers, groups, rank, width.
        dtype: float32 or float64.
        device: where the values are drawn.
        generator: the source of randomness; None for PyTorch's global one of ``device``.
    """
    layers, groups, rank, dim = shape
    bound = 1 / math.sqrt(dim)

    def uniform(*size: int, low: float, high: float) -> Tensor:
        values = torch.empty(size, dtype=dtype, device=device)
        return values.uniform_(low, high, generator=generator)

    if spec.orthonormal:
        normal = torch.empty(layers, groups, dim, rank, dtype=dtype, device=device)
        frame, upper = torch.linalg.qr(normal.normal_(generator=generator))
        # QR does not determine signs; a positive diagonal makes the result uniformly distributed.
        signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(dtype)
        rotation = (frame * signs.unsqueeze(-2)).mT.contiguous()
    else:
        rotation = uniform(*shape, low=-bound, high=bound)
    if not spec.has_encode:
        return InitialValues(rotation, None, uniform(layers, groups, rank, low=0.0, high=1.0))
    weight = uniform(*shape, low=-bound, high=bound)
    return InitialValues(rotation, weight, uniform(layers, groups, rank, low=-bound, high=bound))


def why_not_identity(spec: EditSpec, activation: str | None, dtype: torch.dtype) -> str | None:
    """Explain why no values make the edit exactly zero; None if some do."""
    if not spec.orthonormal:
        return None  # R = 0
    if spec.subtract and not spec.has_encode:
        return "Rᵀ(b − R h) with an orthonormal R moves almost every h"
    if spec.subtract and activation is not None:
        return f"{activation}(W h + b) equals R h for no W and b"
    if spec.subtract and torch.finfo(dtype).eps > torch.finfo(torch.float32).eps:
        return f"W in {str(dtype).removeprefix('torch.')} cannot hold R exactly"
    if activation is not None:
        zero = torch.zeros((), requires_grad=True)
        with torch.enable_grad():
            value = activate(activation, zero)
            (slope,) = torch.autograd.grad(value, zero)
        if float(value.detach()) != 0.0:
            return f"{activation}(0) is not 0"
        if float(slope) == 0.0:
            return f"{activation} is flat at 0, so every gradient would be 0 for ever"
    return None


def identity_values(spec: EditSpec, initial: InitialValues, rotation: Tensor) -> dict[str, Tensor]:
    """Return the values that make the edit zero, by parameter name.

    Args:
        spec: the row of the family table.
        initial: the drawn values.
        rotation: R as the forward computes it; W must equal it bit for bit.
    """
    if not spec.orthonormal:
        return {"rotation": torch.zeros_like(initial.rotation)}
    values = {"bias": torch.zeros_like(initial.bias)}
    if initial.weight is not None:
        values["weight"] = rotation.clone() if spec.subtract else torch.zeros_like(initial.weight)
    return values
