"""What a forward needs of an adapter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Effective(NamedTuple):
    """What the kernels need, layer by layer: the edit is act(A h + b)·R − σ·R h, with A, b, R
    given. A named tuple, because engines that shard parameters look for tensors in what a module
    returns, and in tuples, to know when backward comes to it.

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

    @property
    def dtype(self) -> torch.dtype:
        """Of all of them."""
        return self.decode[0].dtype


def mask_ranks(form: Effective, kept: Tensor | None) -> Effective:
    """The same edit in some directions alone: rows of the others are zero in A, b and R.

    Args:
        form: of an adapter.
        kept: bool (r,); None for all directions.
    """
    if kept is None:
        return form

    def masked(part: Tensor) -> Tensor:
        mask = kept.to(part.device)
        return torch.where(mask if part.ndim == 2 else mask.unsqueeze(1), part, 0.0)

    return Effective(
        encode=None if form.encode is None else tuple(map(masked, form.encode)),
        bias=tuple(map(masked, form.bias)),
        decode=tuple(map(masked, form.decode)),
        subtract=form.subtract,
        activation=form.activation,
    )


def scaled(form: Effective, factor: float) -> Effective:
    """The same edit times ``factor``.

    Raises:
        ValueError: R h stands beside an activation, inside the edit: then no change of the
            parameters multiplies it.
    """
    if factor == 1.0:
        return form
    if form.subtract:
        raise ValueError(
            f"adapter_scales must be 1 for an adapter with activation {form.activation!r} while "
            f"it is trained or compiled, got {factor}"
        )
    return form._replace(decode=tuple(part * factor for part in form.decode))
