"""How an adapter starts.

``pyreft`` draws what pyreft draws: R from the uniform distribution over orthonormal frames, or like
the rows of an ``nn.Linear`` where R is free; W and b like an ``nn.Linear`` of D inputs; b
uniform in [0, 1) where there is no W. ``identity`` draws the same and then clears what makes the
edit act, so that the model starts as its base, bit for bit, and still has gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from reft_kernels.activations import activate
from reft_kernels.spec import EditSpec


@dataclass(frozen=True)
class Start:
    """First values of one adapter, float32 or wider: R and W (L, g, r, D) and b (L, g, r)."""

    rotation: Tensor
    weight: Tensor | None
    bias: Tensor

    def select(self, layers: list[int]) -> Start:
        """Those of some layers, by their place in the stack."""
        weight = None if self.weight is None else self.weight[layers]
        return Start(self.rotation[layers], weight, self.bias[layers])


def pyreft(
    spec: EditSpec,
    shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Start:
    """pyreft's distribution for a member of the family.

    Args:
        spec: the row of the family table.
        shape: (L, g, r, D): layers, groups, rank, width.
        dtype: of the drawn numbers, float32 or float64.
        device: where they are drawn.
        generator: the source of randomness; None for PyTorch's global one of ``device``.
    """
    layers, groups, rank, dim = shape
    bound = 1 / math.sqrt(dim)

    def uniform(*size: int, low: float, high: float) -> Tensor:
        drawn = torch.empty(size, dtype=dtype, device=device)
        return drawn.uniform_(low, high, generator=generator)

    if spec.orthonormal:
        normal = torch.empty(layers, groups, dim, rank, dtype=dtype, device=device)
        frame, upper = torch.linalg.qr(normal.normal_(generator=generator))
        # QR fixes no signs; those of a positive diagonal make the frame uniformly distributed.
        signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(dtype)
        rotation = (frame * signs.unsqueeze(-2)).mT.contiguous()
    else:
        rotation = uniform(*shape, low=-bound, high=bound)
    if not spec.has_encode:
        return Start(rotation, None, uniform(layers, groups, rank, low=0.0, high=1.0))
    weight = uniform(*shape, low=-bound, high=bound)
    return Start(rotation, weight, uniform(layers, groups, rank, low=-bound, high=bound))


def identity_obstacle(spec: EditSpec, activation: str | None, dtype: torch.dtype) -> str | None:
    """Why no values make the edit of this member exactly zero, or None if some do."""
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
            return f"{activation} is flat at 0, so that no gradient would ever be other than 0"
    return None


def identity(spec: EditSpec, start: Start, effective_rotation: Tensor) -> Mapping[str, Tensor]:
    """The values to replace in ``start`` so that the edit is zero, by their name in a bank.

    Args:
        effective_rotation: R as the forward will see it, which W has to equal bit for bit.
    """
    if not spec.orthonormal:
        return {"rotation": torch.zeros_like(start.rotation)}
    replaced = {"bias": torch.zeros_like(start.bias)}
    if start.weight is not None:
        replaced["weight"] = (
            effective_rotation.clone() if spec.subtract else torch.zeros_like(start.weight)
        )
    return replaced
