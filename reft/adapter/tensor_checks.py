"""Checks of the tensors of a saved adapter: names, shapes, numbers, orthonormal rows of R."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reft.config import FLOATS, ReftConfig
from reft.safe_read import shown
from reft_kernels import orthonormalize

#: (layers, groups, rank, width)
StackShape = tuple[int, int, int, int]

#: Prefix of the tensors of ``modules_to_save``, modules that are trained in full.
MODULES_PREFIX = "heads."

#: Tensors that only a training run needs, for an R that is kept orthonormal.
TRAINING_STATE = ("rotation.base", "rotation.free")

#: The largest max |R Rᵀ − I| of an orthonormal R that was saved in a dtype.
_TOLERANCES = {torch.bfloat16: 0.05, torch.float16: 0.01}
_TOLERANCE = 1e-3

#: The largest max |R Rᵀ − I| that rounding to float32 leaves.
EXACT = 1e-5


def stack_shape(config: ReftConfig, layers: int, dim: int) -> StackShape:
    """Return the shape (L, g, r, D) of R, stacked over all layers.

    Raises:
        ValueError: a rank above D.
    """
    if config.rank > dim:
        raise ValueError(
            f"ReftConfig.rank must be at most D = {dim}, the model's width; got "
            f"{shown(config.rank)}"
        )
    return layers, config.num_groups, config.rank, dim


# -------------------------------------------------------------------- names, shapes and numbers


def check_shapes(config: ReftConfig, shape: StackShape, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a tensor of a wrong shape.

    Args:
        config: of the adapter.
        shape: from :func:`stack_shape`.
        tensors: any of ``rotation``, ``weight``, ``bias``, ``rotation.free``, ``rotation.base``.

    Raises:
        ValueError: a wrong shape, or a W although the family row has none.
    """
    layers, groups, rank, dim = shape
    for name, value in tensors.items():
        if name == "weight" and not config.spec.has_encode:
            raise ValueError(f"weight must be None, {config.spec.name} has no W")
        if name in TRAINING_STATE:
            expected: tuple[int, ...] = (layers, groups, dim, rank)
        else:
            expected = shape[:3] if name == "bias" else shape
        if tuple(value.shape) != expected:
            raise ValueError(
                f"{name} must have shape {expected}: layers, groups, rank, and for R and W the "
                f"width; got {tuple(value.shape)}"
            )


def check_layout(
    config: ReftConfig,
    shape: StackShape,
    tensors: Mapping[str, Tensor],
    *,
    training_state: bool = False,
) -> None:
    """Refuse names and shapes that are not those of an adapter, without reading a number.

    Args:
        config: of the adapter.
        shape: from :func:`stack_shape`.
        tensors: by name, on any device.
        training_state: require the tensors of a training run, which are optional otherwise.

    Raises:
        ValueError: a missing or unknown name, a wrong shape.
    """
    optional = set(TRAINING_STATE) if config.spec.orthonormal else set()
    required = {"rotation", "bias"} | ({"weight"} if config.spec.has_encode else set())
    known = required | optional
    missing = sorted((known if training_state else required) - tensors.keys())
    unknown = sorted(tensors.keys() - known)
    if missing or unknown:
        raise ValueError(
            f"an adapter of {config.spec.name} has {', '.join(sorted(known))}; "
            f"missing: {', '.join(missing) or 'none'}, unknown: {_listed(unknown)}"
        )
    check_shapes(config, shape, tensors)


def check_adapter_tensors(
    config: ReftConfig,
    shape: StackShape,
    tensors: Mapping[str, Tensor],
    *,
    training_state: bool = False,
) -> None:
    """Refuse tensors that are not those of an adapter.

    Raises:
        ValueError: as :func:`check_layout`, or a dtype that is not floating-point, or numbers that
            are not finite in the adapter's dtype.
    """
    check_layout(config, shape, tensors, training_state=training_state)
    for name, value in sorted(tensors.items()):
        # An orthonormal R and its base are kept in float32 or wider.
        is_cast = name in ("weight", "bias") or not config.spec.orthonormal
        check_numbers(name, value, config.torch_dtype if is_cast else None)


def check_numbers(name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
    """Refuse a tensor that does not hold finite floating-point numbers.

    Args:
        name: of the tensor, for the message.
        value: any shape.
        dtype: the dtype that it will be cast to; None for its own.

    Raises:
        ValueError: another dtype, NaN, infinity, or a number that ``dtype`` cannot represent.
    """
    if value.dtype not in FLOATS:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise ValueError(f"{name} must be stored as one of {allowed}, got {value.dtype}")
    if not value.isfinite().all():
        raise ValueError(f"{name} must be finite, it holds NaN or infinity")
    if dtype is not None and not value.to(dtype).isfinite().all():
        raise ValueError(
            f"{name} must be finite in {str(dtype).removeprefix('torch.')}, it holds "
            f"{float(value.abs().max()):g}"
        )


def _listed(names: list[str]) -> str:
    more = ["…"] if len(names) > 5 else []
    return ", ".join([*(name[:200] for name in names[:5]), *more]) or "none"


# -------------------------------------------------------------------- orthonormal rows


def orthonormality_error(rotation: Tensor) -> float:
    """Return max |R Rᵀ − I| over all R, (…, r, D)."""
    eye = torch.eye(rotation.shape[-2], dtype=rotation.dtype, device=rotation.device)
    return float((rotation @ rotation.mT - eye).abs().max())


def check_orthonormal(rotation: Tensor, compute_dtype: torch.dtype, name: str) -> None:
    """Refuse an R whose rows are further from orthonormal than its dtype explains.

    Args:
        rotation: (…, r, D), as it was saved.
        compute_dtype: float32 or wider, for :func:`orthonormality_error`.
        name: of the family row, for the message.

    Raises:
        ValueError: the rows are not orthonormal.
    """
    error = orthonormality_error(rotation.to(compute_dtype))
    tolerance = _TOLERANCES.get(rotation.dtype, _TOLERANCE)
    if not error <= tolerance:  # refuses NaN too
        raise ValueError(
            f"rotation must have orthonormal rows for {name} (max |R Rᵀ − I| at most "
            f"{tolerance:g}), got {error:.3g}"
        )


def check_coordinates(tensors: Mapping[str, Tensor], compute_dtype: torch.dtype, name: str) -> None:
    """Refuse ``rotation.free`` and ``rotation.base`` that do not give ``rotation``.

    Args:
        tensors: these three, by name.
        compute_dtype: float32 or wider.
        name: of the family row, for the message.

    Raises:
        ValueError: they give another R, or rows that are not orthonormal.
    """
    free, base = (tensors[f"rotation.{part}"].to(compute_dtype) for part in ("free", "base"))
    expected, saved = orthonormalize(free, base), tensors["rotation"].to(compute_dtype)
    difference = float((expected - saved).abs().max())
    tolerance = _TOLERANCES.get(tensors["rotation"].dtype, _TOLERANCE)
    if not (orthonormality_error(expected) <= tolerance and difference <= tolerance):
        raise ValueError(
            f"rotation.free and rotation.base must give the rotation of this {name} (to "
            f"{tolerance:g}), they differ by {difference:.3g}"
        )


def restore_signs(base: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Restore the signs ±1 in the base point of R, on its diagonal.

    R is orthonormal then, whatever rounding or averaging of state dicts has done to the signs.

    Args:
        base: (…, D, r), as :func:`reft_kernels.orthonormalize` takes it, of any floating-point
            dtype.
        compute_dtype: of the result, a copy.
    """
    restored = base.to(compute_dtype, copy=True)
    diagonal = restored.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(torch.where(diagonal > 0, 1.0, -1.0))
    return restored
