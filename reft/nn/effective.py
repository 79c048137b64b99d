"""What a forward needs of an adapter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Effective:
    """What the kernels need, layer by layer: the edit is act(A h + b)·R − σ·R h, with A, b, R
    given.

    Attributes:
        encode: A or W of each layer, (g, r, D), or None.
        bias: b of each layer, (g, r).
        decode: R of each layer, (g, r, D).
        subtract: σ = 1 is left to the kernel, because an activation stands between.
        activation: its name, or None.
    """

    encode: tuple[Tensor, ...] | None
    bias: tuple[Tensor, ...]
    decode: tuple[Tensor, ...]
    subtract: bool
    activation: str | None
