"""From the tensors of another library's units to those of an adapter.

A unit is one W, b and R: what one layer edits all its tokens with, or one of two, for its first and
its last tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reft.adapter.tensor_checks import bank_shape, check_adapter_tensors, check_numbers
from reft.config import FLOATS, ReftConfig
from reft_kernels import FAMILY
from reft_kernels.activations import ALIASES

#: Largest |R Rᵀ − I| of an R that was kept orthonormal in float32.
_ORTHONORMAL_WITHIN = 1e-3


@dataclass(frozen=True, eq=False)
class Unit:
    """One W, b and R as they were stored.

    Attributes:
        source: the name of the file or module, for messages.
        candidates: the members of the family that store tensors of these names.
        rotation: R, (r, D).
        bias: b, (r,).
        weight: W, (r, D), or None.
        projection_bias: b₂ of a projection R h + b₂, (r,), or None.
    """

    source: str
    candidates: tuple[str, ...]
    rotation: Tensor
    bias: Tensor
    weight: Tensor | None = None
    projection_bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Converted:
    """An adapter in this library's form, on no model.

    Attributes:
        config: its configuration; layers are a list.
        tensors: ``rotation``, ``weight`` and ``bias``, as :meth:`AdapterParameters.load` takes
            them.
        heads: parameters of the base model that were trained too, by their name in it.
    """

    config: ReftConfig
    tensors: dict[str, Tensor]
    heads: dict[str, Tensor]

    def __post_init__(self) -> None:
        """Refuse tensors that are not those of the configuration, or not finite.

        Raises:
            ValueError: with the tensor's name.
        """
        rotation, layers = self.tensors.get("rotation"), self.config.layers
        if rotation is not None and rotation.ndim != 4:
            raise ValueError(f"rotation must be (L, g, r, D), got {tuple(rotation.shape)}")
        # Of "all" layers, and of an R that is not there, any number does: no model says how many.
        count, _, _, dim = (1, 1, 1, self.config.rank) if rotation is None else rotation.shape
        shape = bank_shape(self.config, count if layers == "all" else len(layers), dim)
        check_adapter_tensors(self.config, shape, self.tensors)
        for name, value in self.heads.items():
            if value.dtype in FLOATS:
                check_numbers(name, value)

    @property
    def dim(self) -> int:
        """D, the width that it edits."""
        return self.tensors["rotation"].shape[-1]


def orthogonal(original: Tensor, base: Tensor) -> Tensor:
    """The weight of ``torch.nn.utils.parametrizations.orthogonal`` (its householder map).

    Args:
        original: (n, k); the trained parameter.
        base: (m, m) with m = max(n, k).

    Returns:
        (n, k), float32 or wider.
    """
    wide = torch.promote_types(original.dtype, torch.float32)
    tall = (original if original.shape[0] >= original.shape[1] else original.mT).to(wide)
    vectors = tall.tril(-1)
    tau = 2 / (1 + vectors.square().sum(0))
    frame = torch.linalg.householder_product(vectors, tau) * tall.diagonal().int()
    weight: Tensor = base.to(wide) @ frame
    return weight if weight.shape == original.shape else weight.mT


def convert(
    units: Mapping[tuple[int, int], Unit],
    heads: Mapping[str, Tensor],
    *,
    intervention: str | None,
    settings: Mapping[str, Any],
) -> Converted:
    """Stack units into an adapter.

    Args:
        units: (layer, k) -> unit; k = 0 for first tokens or all of them, 1 for last tokens.
        heads: as in :class:`Converted`.
        intervention: the member of the family, None for the only one that the tensors allow.
        settings: the other fields of :class:`ReftConfig`.

    Raises:
        ValueError: units that one configuration cannot hold; with the layers that differ.
    """
    if not units:
        raise ValueError("at least one layer must be edited, got none that edits a token")
    layers = sorted({layer for layer, _ in units})
    groups = _groups(units, layers, ReftConfig(**settings))
    name = _member(units, intervention)
    shape = _same_shape(units)
    ordered = [[units[layer, group] for group in groups] for layer in layers]
    everything = [unit for row in ordered for unit in row]
    dtype = functools.reduce(
        torch.promote_types,
        [one.dtype for unit in everything for one in (unit.rotation, unit.weight, unit.bias)
         if one is not None],
        torch.float32,
    )  # fmt: skip
    spec = FAMILY[name]
    activation: str | None = settings.get("activation")
    linear = activation is None or ALIASES.get(activation, activation) is None
    if spec.subtract and linear:
        bias = [[_folded(unit) for unit in row] for row in ordered]
    else:
        if spec.subtract:
            _refuse_projection_bias(everything, activation)
        bias = [[unit.bias for unit in row] for row in ordered]
    tensors = {
        "rotation": _stack([[unit.rotation for unit in row] for row in ordered], dtype),
        "bias": _stack(bias, dtype),
    }
    if spec.has_encode:
        weights = [[unit.weight for unit in row if unit.weight is not None] for row in ordered]
        tensors["weight"] = _stack(weights, dtype)
    if spec.orthonormal:
        _check_orthonormal(tensors["rotation"], layers)
    config = ReftConfig(
        intervention=name,
        rank=shape[0],
        layers=layers,
        tied=len(groups) == 1,
        dtype=dtype,
        modules_to_save=_modules(heads) or None,
        **settings,
    )
    return Converted(config, tensors, dict(heads))


def _groups(
    units: Mapping[tuple[int, int], Unit], layers: list[int], settings: ReftConfig
) -> list[int]:
    """The k of every layer's units: [0] or [0, 1]."""
    held = {layer: sorted(k for one, k in units if one == layer) for layer in layers}
    for layer, found in held.items():
        if len(found) > 2 or found != list(range(len(found))):
            raise ValueError(
                "a layer must have one unit, or two, #0 for first and #1 for last tokens; layer "
                f"{layer} has {', '.join(f'#{k}' for k in found)}"
            )
    counts = {len(found) for found in held.values()}
    if len(counts) > 1:
        listed = {n: [layer for layer, found in held.items() if len(found) == n] for n in (1, 2)}
        raise ValueError(
            f"all layers must have as many units; layers {_listed(listed[1])} have one, layers "
            f"{_listed(listed[2])} have two"
        )
    groups = held[layers[0]]
    if len(groups) == 2 and settings.parsed_positions.num_groups(tied=False) == 1:
        raise ValueError(
            "positions must name first and last tokens, because every layer has a unit for each "
            f'side; got "{settings.positions}"'
        )
    return groups


def _member(units: Mapping[tuple[int, int], Unit], asked: str | None) -> str:
    """The member of the family that every unit is."""
    if asked is not None and asked not in FAMILY:
        raise ValueError(f"intervention must be one of {', '.join(FAMILY)}; got {asked!r}")
    kinds: dict[tuple[str, ...], list[int]] = {}
    for (layer, _), unit in units.items():
        kinds.setdefault(unit.candidates, []).append(layer)
    if len(kinds) > 1:
        listed = "; ".join(
            f"layers {_listed(sorted(set(layers)))}: {' or '.join(names)}"
            for names, layers in kinds.items()
        )
        raise ValueError(f"all layers must have the same intervention, got {listed}")
    [candidates] = kinds
    if asked is None and len(candidates) > 1:
        listed = " or ".join(f'"{name}"' for name in candidates)
        raise ValueError(
            f"intervention must be given, {listed}: they store tensors of the same names, and "
            "nothing else in the folder tells them apart"
        )
    if asked is not None and asked not in candidates:
        raise ValueError(
            f"intervention must be {' or '.join(candidates)}, whose tensors are stored here; "
            f"got {asked!r}"
        )
    return asked or candidates[0]


def _same_shape(units: Mapping[tuple[int, int], Unit]) -> tuple[int, int]:
    """(r, D) of every unit."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for (layer, _), unit in units.items():
        shape, bias = tuple(unit.rotation.shape), tuple(unit.bias.shape)
        weight = unit.rotation if unit.weight is None else unit.weight
        fitting = len(shape) == 2 and tuple(weight.shape) == shape and bias == shape[:1]
        fitting &= unit.projection_bias is None or unit.projection_bias.shape == unit.bias.shape
        if not fitting or not 0 < shape[0] <= shape[1]:
            raise ValueError(
                f"{unit.source} must hold R and W of (r, D), r at most D, and b of (r,), got "
                f"shapes {shape}, {tuple(weight.shape)} and {bias}"
            )
        shapes.setdefault((shape[0], shape[1]), []).append(layer)
    if len(shapes) > 1:
        listed = "; ".join(
            f"layers {_listed(sorted(set(layers)))}: rank {rank}, width {dim}"
            for (rank, dim), layers in shapes.items()
        )
        raise ValueError(f"all layers must have the same rank and width, got {listed}")
    [only] = shapes
    return only


def _folded(unit: Unit) -> Tensor:
    """b − b₂: the subtracted projection R h + b₂ takes b₂ along."""
    if unit.projection_bias is None:
        return unit.bias
    wide = torch.promote_types(unit.bias.dtype, torch.float32)
    return unit.bias.to(wide) - unit.projection_bias.to(wide)


def _refuse_projection_bias(units: list[Unit], activation: str | None) -> None:
    for unit in units:
        if unit.projection_bias is not None and unit.projection_bias.any():
            raise ValueError(
                f"activation must be None for {unit.source}, got {activation!r}: the bias of its "
                "projection stands outside the activation, where this library has none"
            )


def _stack(rows: list[list[Tensor]], dtype: torch.dtype) -> Tensor:
    return torch.stack([torch.stack([one.to(dtype) for one in row]) for row in rows])


def _check_orthonormal(rotation: Tensor, layers: list[int]) -> None:
    eye = torch.eye(rotation.shape[-2], dtype=rotation.dtype)
    errors = (rotation @ rotation.mT - eye).abs().amax(dim=(1, 2, 3))
    wrong = [layer for layer, e in zip(layers, errors.tolist(), strict=True)
             if not e <= _ORTHONORMAL_WITHIN]  # fmt: skip
    if wrong:
        raise ValueError(
            f"R must have orthonormal rows (max |R Rᵀ − I| at most {_ORTHONORMAL_WITHIN:g}), got "
            f"{errors.max():.3g} in layers {_listed(wrong)}; weight decay sets R to zero in the "
            "library that wrote this, and then nothing is left of the adapter"
        )


def _modules(heads: Mapping[str, Tensor]) -> list[str]:
    """The modules that the named parameters belong to, in order."""
    bare = [name for name in heads if "." not in name]
    if bare:
        raise ValueError(f"trained parameters must belong to a module, got {', '.join(bare)}")
    return list(dict.fromkeys(name.rpartition(".")[0] for name in heads))


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
