"""Folders of the library adapters: ``adapter_config.json`` and one file of tensors.

    model.layers.0.reft_layer.refts.<name>.units.0.learned_source.weight            W, and .bias b
    model.layers.0.reft_layer.refts.<name>.units.0.projection.weight                R, or
    ….projection.parametrizations.weight.original and ….weight.0.base               R orthonormal

Unit 0 edits first tokens, or all tokens if the weights are tied; unit 1 edits last tokens. Both are
stored even if one of them edits nothing. Whether R h is subtracted is not stored.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reft.config import ReftConfig
from reft.interop.units import Converted, Unit, convert, orthogonal
from reft.io.tensor_files import check_floats, read_tensors
from reft.safe_read import parse_json, read_text, shown

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("pytorch_adapter.bin", "adapter.safetensors")
HEAD_FILES = ("pytorch_model_head.bin", "model_head.safetensors")

_KEY = re.compile(
    r"(?P<stack>.*?)\.?(?P<layer>\d+)\.reft_layer\.refts\.(?P<name>.+)"
    r"\.units\.(?P<unit>[01])\.(?P<tensor>.+)",
    re.ASCII,
)
_SOURCE = {"learned_source.weight", "learned_source.bias"}
_ORIGINAL = "projection.parametrizations.weight.original"
_BASE = "projection.parametrizations.weight.0.base"

#: Tensor names of a unit -> family members that store them. adapters has no class for
#: direft_orthonormal.
_CANDIDATES: dict[frozenset[str], tuple[str, ...]] = {
    frozenset({*_SOURCE, _ORIGINAL, _BASE}): ("loreft", "direft_orthonormal"),
    frozenset({*_SOURCE, "projection.weight"}): ("noreft", "direft"),
}

#: Name of an activation in adapters -> name in reft.
_ACTIVATIONS = {"leakyrelu": "leaky_relu"}


def stored_config(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the configuration that adapters stored; None if adapters did not write the folder."""
    try:
        stored = parse_json(read_text(Path(path) / CONFIG_FILE))
        inner = stored["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return stored if isinstance(inner, dict) and "architecture" in inner else None


def read_adapters(
    path: str | os.PathLike[str],
    *,
    intervention: str | None = None,
    head: bool = False,
    **settings: Any,
) -> Converted:
    """Read a ReFT adapter of the library adapters; the base model is not needed.

    Args:
        path: the folder.
        intervention: reft's name of the intervention; required if R is not orthonormal.
        head: also read the prediction head.
        settings: fields of :class:`ReftConfig` that override the stored ones.

    Raises:
        OSError: the folder does not exist, or a file is missing in it.
        ValueError: a damaged file, an adapter that is not ReFT, or units that do not fit one
            configuration.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such adapters folder", str(folder))
    stored = stored_config(folder)
    if stored is None:
        raise FileNotFoundError(
            errno.ENOENT, f"not an adapters folder, it has no {CONFIG_FILE} of that library",
            str(folder),
        )  # fmt: skip
    inner = stored["config"]
    try:
        if inner["architecture"] != "reft":
            raise ValueError(
                f"the adapter must have the architecture 'reft', got {shown(inner['architecture'])}"
            )
        fields = {**_settings(inner), **settings}
        ReftConfig(**fields)
        tensors = read_tensors(_first_file(folder, WEIGHTS_FILES))
        units = _active_units(_units(tensors), inner)
        candidates = {name for unit in units.values() for name in unit.candidates}
        if intervention is None and candidates == {"noreft", "direft"}:
            raise ValueError(
                'intervention must be given, "noreft" or "direft": adapters does not store '
                "subtract_projection, and loads its own DiReFT back as NoReFT"
            )
        if intervention is None and candidates == {"loreft", "direft_orthonormal"}:
            intervention = "loreft"
        heads = read_tensors(_first_file(folder, HEAD_FILES)) if head else {}
        name = stored.get("model_name") or None
        fields.setdefault("base_model_name_or_path", name)
        return convert(units, heads, intervention=intervention, settings=fields)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _settings(inner: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the stored settings to fields of :class:`ReftConfig`."""
    try:
        sides = (("f", inner["prefix_positions"]), ("l", inner["suffix_positions"]))
        for _, count in sides:
            if type(count) is not int or count < 0:
                raise ValueError(f"positions must be integers of at least 0, got {shown(count)}")
        positions = "+".join(f"{side}{count}" for side, count in sides if count)
        activation = inner.get("non_linearity")
        if activation is not None:
            activation = _ACTIVATIONS.get(activation.lower(), activation.lower())
        return {
            "positions": positions,
            "activation": activation,
            "dropout": inner.get("dropout", 0.0),
            "dropout_on": "row",
        }
    except (KeyError, AttributeError):
        raise ValueError(
            f"{CONFIG_FILE} must have prefix_positions, suffix_positions and non_linearity"
        ) from None


def _first_file(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(errno.ENOENT, f"it has no {' or '.join(names)}", str(folder))


def _units(tensors: Mapping[str, Tensor]) -> dict[tuple[int, int], Unit]:
    """Group tensors into units, by (layer, unit number)."""
    groups: dict[tuple[int, int], dict[str, Tensor]] = {}
    adapters: dict[tuple[str, str], None] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key} is not a tensor of a ReFT adapter")
        adapters[match["stack"], match["name"]] = None
        groups.setdefault((int(match["layer"]), int(match["unit"])), {})[match["tensor"]] = value
    if len(adapters) != 1:
        listed = ", ".join(f"{name!r} in {stack}" for stack, name in adapters) or "none"
        raise ValueError(f"the folder must hold one adapter of one stack of blocks, got {listed}")
    return {key: _unit(*key, group) for key, group in groups.items()}


def _unit(layer: int, number: int, tensors: Mapping[str, Tensor]) -> Unit:
    source = f"unit {number} of layer {layer}"
    candidates = _CANDIDATES.get(frozenset(tensors))
    if candidates is None:
        raise ValueError(f"{source} must hold W, b and a projection, it holds {', '.join(tensors)}")
    check_floats(source, tensors)
    if _ORIGINAL in tensors:
        original, base = tensors[_ORIGINAL], tensors[_BASE]
        if original.ndim != 2 or base.shape != (max(original.shape), max(original.shape)):
            raise ValueError(
                f"{source} must hold {_ORIGINAL} (r, D) and {_BASE} (D, D), got shapes "
                f"{tuple(original.shape)} and {tuple(base.shape)}"
            )
        rotation = orthogonal(original, base)
    else:
        rotation = tensors["projection.weight"]
    return Unit(
        source=source,
        candidates=candidates,
        rotation=rotation,
        bias=tensors["learned_source.bias"],
        weight=tensors["learned_source.weight"],
    )


def _active_units(
    units: Mapping[tuple[int, int], Unit], inner: Mapping[str, Any]
) -> dict[tuple[int, int], Unit]:
    """Drop the units that edit no token."""
    if inner.get("tied_weights") or (inner["prefix_positions"] and inner["suffix_positions"]):
        return dict(units)
    active = 0 if inner["prefix_positions"] else 1
    return {(layer, 0): unit for (layer, number), unit in units.items() if number == active}
