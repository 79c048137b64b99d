"""Conversion of another library's units into the tensors of an adapter.

A unit holds W, b and R. A layer has one unit for all edited tokens, or two, for first and for last
tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reft.adapter.tensor_checks import check_adapter_tensors, check_numbers, stack_shape
from reft.config import FLOATS, ReftConfig
from reft_kernels import FAMILY
from reft_kernels.activations import ALIASES

#: Largest |R Rᵀ − I| of an R that was kept orthonormal in float32.
_ORTHONORMAL_WITHIN = 1e-3


@dataclass(frozen=True, eq=False)
class Unit:
    """W, b and R as stored.

    Attributes:
        source: name of the file or module, for messages.
        candidates: family members that store tensors of these names.
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
    """A converted adapter without a model.

    Attributes:
        config: its configuration; layers are a list.
        tensors: ``rotation``, ``weight`` and ``bias`` for :meth:`AdapterParameters.load`.
        heads: trained parameters of the base model, by their name in it.
    """

    config: ReftConfig
    tensors: dict[str, Tensor]
    heads: dict[str, Tensor]

    def __post_init__(self) -> None:
        """Check that the tensors fit the configuration and are finite.

        Raises:
            ValueError: a tensor does not; the message names it.
        """
        rotation, layers = self.tensors.get("rotation"), self.config.layers
        if rotation is not None and rotation.ndim != 4:
            raise ValueError(f"rotation must be (L, g, r, D), got {tuple(rotation.shape)}")
        # Without a model, "all" layers and a missing R fit any number of layers.
        count, _, _, dim = (1, 1, 1, self.config.rank) if rotation is None else rotation.shape
        shape = stack_shape(self.config, count if layers == "all" else len(layers), dim)
        check_adapter_tensors(self.config, shape, self.tensors)
        for name, value in self.heads.items():
            if value.dtype in FLOATS:
                check_numbers(name, value)

    @property
    def dim(self) -> int:
        """D, the width of the edited vectors."""
        return self.tensors["rotation"].shape[-1]


def orthogonal(original: Tensor, base: Tensor) -> Tensor:
    """Compute the weight of ``torch.nn.utils.parametrizations.orthogonal`` (householder map).

    Args:
        original: (n, k), the trained parameter.
        base: (m, m), m = max(n, k).

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
        units: (layer, k) -> unit; k = 0 for first tokens or all tokens, 1 for last tokens.
        heads: see :class:`Converted`.
        intervention: the family member; None if the tensors determine it.
        settings: the other fields of :class:`ReftConfig`.

    Raises:
        ValueError: the units do not fit one configuration; the message has the layers that differ.
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
        [tensor.dtype for unit in everything for tensor in (unit.rotation, unit.weight, unit.bias)
         if tensor is not None],
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
    """Return the k of the units of every layer: [0] or [0, 1]."""
    groups_of = {layer: sorted(k for owner, k in units if owner == layer) for layer in layers}
    for layer, groups in groups_of.items():
        if len(groups) > 2 or groups != list(range(len(groups))):
            raise ValueError(
                "a layer must have one unit, or two, #0 for first and #1 for last tokens; layer "
                f"{layer} has {', '.join(f'#{k}' for k in groups)}"
            )
    counts = {len(groups) for groups in groups_of.values()}
    if len(counts) > 1:
        listed = {
            n: [layer for layer, groups in groups_of.items() if len(groups) == n] for n in (1, 2)
        }
        raise ValueError(
            "all layers must have the same number of units; layers "
            f"{_listed(listed[1])} have one, layers {_listed(listed[2])} have two"
        )
    groups = groups_of[layers[0]]
    if len(groups) == 2 and settings.parsed_positions.num_groups(tied=False) == 1:
        raise ValueError(
            "positions must name first and last tokens, because every layer has a unit for each "
            f'side; got "{settings.positions}"'
        )
    return groups


def _member(units: Mapping[tuple[int, int], Unit], requested: str | None) -> str:
    """Return the family member of all units."""
    if requested is not None and requested not in FAMILY:
        raise ValueError(f"intervention must be one of {', '.join(FAMILY)}; got {requested!r}")
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
    if requested is None and len(candidates) > 1:
        listed = " or ".join(f'"{name}"' for name in candidates)
        raise ValueError(
            f"intervention must be given, {listed}: they store tensors of the same names, and "
            "nothing else in the folder distinguishes them"
        )
    if requested is not None and requested not in candidates:
        raise ValueError(
            f"intervention must be {' or '.join(candidates)}, whose tensors are stored here; "
            f"got {requested!r}"
        )
    return requested or candidates[0]


def _same_shape(units: Mapping[tuple[int, int], Unit]) -> tuple[int, int]:
    """Return the (r, D) that all units share."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for (layer, _), unit in units.items():
        size, bias = tuple(unit.rotation.shape), tuple(unit.bias.shape)
        weight = unit.rotation if unit.weight is None else unit.weight
        fitting = len(size) == 2 and tuple(weight.shape) == size and bias == size[:1]
        fitting &= unit.projection_bias is None or unit.projection_bias.shape == unit.bias.shape
        if not fitting or not 0 < size[0] <= size[1]:
            raise ValueError(
                f"{unit.source} must hold R and W of (r, D), r at most D, and b of (r,), got "
                f"shapes {size}, {tuple(weight.shape)} and {bias}"
            )
        shapes.setdefault((size[0], size[1]), []).append(layer)
    if len(shapes) > 1:
        listed = "; ".join(
            f"layers {_listed(sorted(set(layers)))}: rank {rank}, width {dim}"
            for (rank, dim), layers in shapes.items()
        )
        raise ValueError(f"all layers must have the same rank and width, got {listed}")
    [shape] = shapes
    return shape


def _folded(unit: Unit) -> Tensor:
    """Return b − b₂, because the subtracted projection is R h + b₂."""
    if unit.projection_bias is None:
        return unit.bias
    wide = torch.promote_types(unit.bias.dtype, torch.float32)
    return unit.bias.to(wide) - unit.projection_bias.to(wide)


def _refuse_projection_bias(units: list[Unit], activation: str | None) -> None:
    for unit in units:
        if unit.projection_bias is not None and unit.projection_bias.any():
            raise ValueError(
                f"activation must be None for {unit.source}, got {activation!r}: the bias of its "
                "projection is added outside the activation, where reft has no bias"
            )


def _stack(rows: list[list[Tensor]], dtype: torch.dtype) -> Tensor:
    return torch.stack([torch.stack([tensor.to(dtype) for tensor in row]) for row in rows])


def _check_orthonormal(rotation: Tensor, layers: list[int]) -> None:
    eye = torch.eye(rotation.shape[-2], dtype=rotation.dtype)
    errors = (rotation @ rotation.mT - eye).abs().amax(dim=(1, 2, 3))
    wrong = [layer for layer, e in zip(layers, errors.tolist(), strict=True)
             if not e <= _ORTHONORMAL_WITHIN]  # fmt: skip
    if wrong:
        raise ValueError(
            f"R must have orthonormal rows (max |R Rᵀ − I| at most {_ORTHONORMAL_WITHIN:g}), got "
            f"{errors.max():.3g} in layers {_listed(wrong)}; weight decay in the library "
            "that wrote the files reduces R to zero, which destroys the adapter"
        )


def _modules(heads: Mapping[str, Tensor]) -> list[str]:
    """Return the modules of the named parameters in order."""
    bare = [name for name in heads if "." not in name]
    if bare:
        raise ValueError(f"trained parameters must belong to a module, got {', '.join(bare)}")
    return list(dict.fromkeys(name.rpartition(".")[0] for name in heads))


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
