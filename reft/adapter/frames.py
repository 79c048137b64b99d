"""Frames: matrices R (…, r, D) whose rows are orthonormal, as they come from a file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reft_kernels import orthonormalize

#: Largest |R Rᵀ − I| of a matrix that is taken for a frame, for what was stored in each dtype.
_WITHIN = {torch.bfloat16: 0.05, torch.float16: 0.01}
_OTHERWISE = 1e-3

#: The same of a frame that needs no correction: what rounding to float32 leaves.
EXACT = 1e-5


def frame_error(rotation: Tensor) -> float:
    """max |R Rᵀ − I|."""
    eye = torch.eye(rotation.shape[-2], dtype=rotation.dtype, device=rotation.device)
    return float((rotation @ rotation.mT - eye).abs().max())


def check_frame(rotation: Tensor, wide: torch.dtype, name: str) -> None:
    """Refuse a stored R whose :func:`frame_error`, computed in ``wide``, its dtype cannot have
    caused.

    Raises:
        ValueError: the rows are not orthonormal.
    """
    error, within = frame_error(rotation.to(wide)), _WITHIN.get(rotation.dtype, _OTHERWISE)
    if not error <= within:  # NaN is no frame either
        raise ValueError(
            f"rotation must have orthonormal rows for {name} (max |R Rᵀ − I| at most "
            f"{within:g}), got {error:.3g}"
        )


def check_coordinates(tensors: Mapping[str, Tensor], wide: torch.dtype, name: str) -> None:
    """Refuse ``rotation.free`` and ``rotation.base`` of which ``rotation`` did not come.

    Raises:
        ValueError: they stand for rows that are not orthonormal, or for another R.
    """
    free, base = (tensors[f"rotation.{part}"].to(wide) for part in ("free", "base"))
    found, stored = orthonormalize(free, base), tensors["rotation"].to(wide)
    apart = float((found - stored).abs().max())
    within = _WITHIN.get(tensors["rotation"].dtype, _OTHERWISE)
    if not (frame_error(found) <= within and apart <= within):
        raise ValueError(
            f"rotation.free and rotation.base must stand for the rotation of this {name} (to "
            f"{within:g}), they differ by {apart:.3g}"
        )


def as_base(value: Tensor, wide: torch.dtype) -> Tensor:
    """The start of R in a state dict, as :func:`reft_kernels.orthonormalize` takes it: whatever
    rounding or averaging of dictionaries has done to its signs, they are ±1, so that R is
    orthonormal.

    Args:
        value: (…, D, r), of a floating-point dtype.
        wide: what it is made in.
    """
    base = value.to(wide, copy=True)
    diagonal = base.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(torch.where(diagonal > 0, 1.0, -1.0))
    return base
