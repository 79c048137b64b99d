"""What the tensors of a stored adapter have to be, checked before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reft.config import FLOATS, ReftConfig
from reft.safe_read import shown

#: (layers, groups, rank, width)
Shape = tuple[int, int, int, int]

#: Prefix of the tensors of heads, modules that are trained in full.
HEADS = "heads."

#: What a training run needs beside what is published, of an R that is kept orthonormal.
TRAINING = ("rotation.base", "rotation.free")


def bank_shape(config: ReftConfig, layers: int, dim: int) -> Shape:
    """The shape of R in the stack of all layers, (L, g, r, D); nothing is allocated.

    Raises:
        ValueError: a rank above D.
    """
    if config.rank > dim:
        raise ValueError(
            f"ReftConfig.rank must be at most D = {dim}, the model's width; got "
            f"{shown(config.rank)}"
        )
    return layers, config.num_groups, config.rank, dim


def check_shapes(config: ReftConfig, shape: Shape, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a value of another shape.

    Args:
        config: whose values they are.
        shape: as :func:`bank_shape` gives it.
        tensors: any of ``rotation``, ``weight``, ``bias``, ``rotation.free``, ``rotation.base``.

    Raises:
        ValueError: a wrong shape, or a W where the family row has none.
    """
    layers, groups, rank, dim = shape
    for name, value in tensors.items():
        if name == "weight" and not config.spec.has_encode:
            raise ValueError(f"weight must be None, {config.spec.name} has no W")
        if name in TRAINING:
            wanted: tuple[int, ...] = (layers, groups, dim, rank)
        else:
            wanted = shape[:3] if name == "bias" else shape
        if tuple(value.shape) != wanted:
            raise ValueError(
                f"{name} must have shape {wanted}: layers, groups, rank, and for R and W the "
                f"width; got {tuple(value.shape)}"
            )


def check_layout(
    config: ReftConfig, shape: Shape, tensors: Mapping[str, Tensor], *, training_state: bool = False
) -> None:
    """Refuse names and shapes that are not those of an adapter; no number is looked at.

    Args:
        config: of the adapter.
        shape: as :func:`bank_shape` gives it.
        tensors: by name, on any device.
        training_state: whether what a training run needs must be there too; it may be.

    Raises:
        ValueError: a missing or unknown name, a wrong shape.
    """
    extra = set(TRAINING) if config.spec.orthonormal else set()
    needed = {"rotation", "bias"} | ({"weight"} if config.spec.has_encode else set())
    known = needed | extra
    missing = sorted((known if training_state else needed) - tensors.keys())
    unknown = sorted(tensors.keys() - known)
    if missing or unknown:
        raise ValueError(
            f"an adapter of {config.spec.name} has {', '.join(sorted(known))}; "
            f"missing: {', '.join(missing) or 'none'}, unknown: {_listed(unknown)}"
        )
    check_shapes(config, shape, tensors)


def check_adapter_tensors(
    config: ReftConfig, shape: Shape, tensors: Mapping[str, Tensor], *, training_state: bool = False
) -> None:
    """Refuse tensors that are not those of an adapter.

    Raises:
        ValueError: as :func:`check_layout`, or numbers that are no floating-point numbers, or that
            are not finite in the adapter's dtype.
    """
    check_layout(config, shape, tensors, training_state=training_state)
    for name, value in sorted(tensors.items()):
        # R and its base are kept in float32 or wider where they are orthonormal.
        kept = name in ("weight", "bias") or not config.spec.orthonormal
        check_numbers(name, value, config.torch_dtype if kept else None)


def check_numbers(name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
    """Refuse what is no tensor of finite floating-point numbers.

    Args:
        name: of the tensor, for the message.
        value: any shape.
        dtype: what it will be kept as, None for its own.

    Raises:
        ValueError: another dtype, NaN, infinity, or a number that ``dtype`` cannot hold.
    """
    if value.dtype not in FLOATS:
        listed = ", ".join(str(one).removeprefix("torch.") for one in FLOATS)
        raise ValueError(f"{name} must be stored as one of {listed}, got {value.dtype}")
    if not value.isfinite().all():
        raise ValueError(f"{name} must be finite, it holds NaN or infinity")
    if dtype is not None and not value.to(dtype).isfinite().all():
        raise ValueError(
            f"{name} must be finite in {str(dtype).removeprefix('torch.')}, it holds "
            f"{float(value.abs().max()):g}"
        )


def _listed(names: list[str]) -> str:
    more = ["…"] if len(names) > 5 else []
    return ", ".join([*(one[:200] for one in names[:5]), *more]) or "none"
