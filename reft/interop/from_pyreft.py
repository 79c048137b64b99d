"""Folders of pyreft: a pickle of tensors for each intervention, and a ``config.json``.

    intkey_layer_15_comp_block_output_unit_pos_nunit_1#0.bin          pyvene 0.1.7 and later
    intkey_layer.15.comp.block_output.unit.pos.nunit.1#0.bin          before
    intkey_comp_model_layers[15]_output_unit_pos_nunit_1#0.bin        a module named by its path

#0 and #1 number the interventions of a layer: with untied weights, #0 edits first tokens and #1
last tokens. pyreft's trainer writes the same files without config.json, into
``checkpoint-N/intervenable_model``. Positions, activation and dropout are not stored.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from reft.config import COMPONENTS, ReftConfig
from reft.interop.units import Converted, Unit, convert, orthogonal
from reft.io.tensor_files import check_floats, read_tensors
from reft.safe_read import parse_json, read_text, shown
from reft_kernels import FAMILY

#: Folder of the files of pyreft's trainer in a checkpoint.
TRAINER_FOLDER = "intervenable_model"
#: Trained parameters of the base model.
HEADS_FILE = "pytorch_model.bin"

_FILE = re.compile(
    r"intkey_(?:layer[._](?P<layer>\d+)[._])?comp[._](?P<component>.+)"
    r"[._]unit[._](?P<unit>.+)[._]nunit[._]\d+#(?P<copy>\d+)\.bin",
    re.ASCII,
)
_STRING = re.compile(r"(?P<stack>.+)\[(?P<layer>\d+)\](?P<inside>.*)[._](?P<side>input|output)")
_CLASS = re.compile(r"(\w+)'?>?$")

#: Fields of a representation in their order; earlier versions have fewer.
FIELDS = (
    "layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type",
    "intervention", "subspace_partition", "group_key", "intervention_link_key", "moe_key",
    "source_representation", "hidden_source_representation", "latent_dim",
)  # fmt: skip

_BUFFERS = {"embed_dim", "interchange_dim"}
_ORIGINAL = "rotate_layer.parametrizations.weight.original"
_BASE = "rotate_layer.parametrizations.weight.0.base"
_SOURCE = ("learned_source.weight", "learned_source.bias")

#: Tensor names of a file -> family members that store them.
_CANDIDATES: dict[frozenset[str], tuple[str, ...]] = {
    frozenset({"weight", "bias", "rotate_layer"}): ("loreft",),
    frozenset({_ORIGINAL, _BASE, *_SOURCE}): ("direft_orthonormal",),
    frozenset({_ORIGINAL, _BASE, "learned_source"}): ("consreft", "lobireft"),
    frozenset({"proj_layer.weight", *_SOURCE}): ("noreft", "direft"),
    frozenset({"proj_layer.weight", "proj_layer.bias", *_SOURCE}): ("noreft", "direft"),
}


@dataclass(frozen=True)
class _Location:
    """The edited component of one intervention.

    Attributes:
        file: the name of its file.
        layer: the number of its block.
        component: reft's name of the component.
        stack: path of the list of blocks, if the checkpoint names it.
        copy: the number after "#".
    """

    file: str
    layer: int
    component: str
    stack: str | None
    copy: int


def find_pyreft(path: str | os.PathLike[str]) -> Path | None:
    """Return the folder with pyreft's files, ``path`` or its ``intervenable_model``, or None."""
    for folder in (Path(path), Path(path) / TRAINER_FOLDER):
        if folder.is_dir() and any(folder.glob("intkey_*.bin")):
            return folder
    return None


def read_pyreft(
    path: str | os.PathLike[str],
    *,
    intervention: str | None = None,
    head: bool = True,
    **settings: Any,
) -> Converted:
    """Read an adapter of pyreft; the base model is not needed.

    Args:
        path: the folder, or the ``checkpoint-N`` around it.
        intervention: reft's name of the intervention; required if the folder does not determine it.
        head: also read the trained parameters of the base model.
        settings: fields of :class:`ReftConfig` that pyreft does not store; at least positions.

    Raises:
        OSError: the folder does not exist, or has no files of pyreft.
        ValueError: a damaged or foreign file, a bad field, or interventions that do not fit one
            configuration.
    """
    ReftConfig(**settings)  # refuse a bad value before any file is read
    folder = _locate(Path(path))
    try:
        locations, classes = _from_config(folder) or (_from_names(folder), {})
        # Files are read one by one: each may hold D × D numbers, of which only R is kept.
        units = {
            (location.layer, location.copy): _unit(
                location.file, read_tensors(folder / location.file)
            )
            for location in locations
        }
        if len(units) < len(locations):
            raise ValueError("two interventions of one layer have the same number")
        heads = _heads(folder / HEADS_FILE) if head else {}
        component, stack = _shared(locations)
        settings["block_path"] = settings.get("block_path") or stack
        return convert(
            units,
            heads,
            intervention=_intervention(classes, intervention),
            settings={**settings, "component": component},
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _locate(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such pyreft folder", str(path))
    if not path.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, "pyreft stores a folder, but this is a file", str(path)
        )
    folder = find_pyreft(path)
    if folder is None:
        names = sorted(entry.name for entry in path.iterdir())
        listed = ", ".join(names[:5] + ["…"] * (len(names) > 5)) or "nothing"
        raise FileNotFoundError(
            errno.ENOENT, f"not a pyreft folder, it has no intkey_*.bin (it has: {listed})",
            str(path),
        )  # fmt: skip
    return folder


# -------------------------------------------------------------------- locations


def _from_names(folder: Path) -> list[_Location]:
    locations = []
    for file in sorted(path.name for path in folder.glob("intkey_*.bin")):
        match = _FILE.fullmatch(file)
        if match is None:
            raise ValueError(f"{file} is not a file name of pyreft")
        layer = None if match["layer"] is None else int(match["layer"])
        copy = int(match["copy"])
        locations.append(_location(file, layer, match["component"], match["unit"], copy))
    return locations


def _from_config(folder: Path) -> tuple[list[_Location], dict[str, str]] | None:
    """Read the locations and classes of the files from config.json; None if it does not exist."""
    if not (folder / "config.json").exists():
        return None
    try:
        stored = parse_json(read_text(folder / "config.json"))
        keys, listed = stored["sorted_keys"], stored["representations"]
        types = stored["intervention_types"]
        rows = [dict(zip(FIELDS, row, strict=False)) for row in listed]
        copies = [int(key.rpartition("#")[2]) for key in keys]
        whole = len(keys) == len(rows) == len(types) > 0 and all(map(_is_row, rows))
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(
            "config.json must be one that pyreft wrote, with sorted_keys, representations and "
            "intervention_types for each file; it is damaged or foreign"
        )
    files = [f"intkey_{key}.bin" for key in keys]
    present = {path.name for path in folder.glob("intkey_*.bin")}
    missing, unknown = sorted(set(files) - present), sorted(present - set(files))
    if missing or unknown:
        raise ValueError(
            "config.json must list the files of the folder; missing: "
            f"{', '.join(missing) or 'none'}, not listed: {', '.join(unknown) or 'none'}"
        )
    if copies != sorted(copies):
        # pyreft applies the first half of all interventions to the first tokens.
        raise ValueError(
            "config.json must list every #0 before every #1; in another order, pyreft applied both "
            "to first tokens"
        )
    locations = []
    for file, copy, row in zip(files, copies, rows, strict=True):
        if row.get("intervention_link_key") is not None:
            raise ValueError(
                f"{file} shares weights with other layers (intervention_link_key "
                f"{shown(row['intervention_link_key'])}); reft has separate weights for each layer"
            )
        component = row["component"]
        layer = None if "." in component else row["layer"]
        locations.append(_location(file, layer, component, str(row.get("unit", "pos")), copy))
    return locations, dict(zip(files, (str(kind)[:1000] for kind in types), strict=True))


def _is_row(row: Mapping[str, Any]) -> bool:
    """Whether a representation has a component, and a layer unless the component is a path."""
    component, layer = row.get("component"), row.get("layer")
    named = isinstance(component, str) and len(component) < 1000
    return named and ("." in str(component) or (type(layer) is int and layer >= 0))


def _location(file: str, layer: int | None, component: str, unit: str, copy: int) -> _Location:
    if unit != "pos":
        raise ValueError(f'{file} must edit units "pos", single tokens; got "{unit}"')
    if layer is not None and component in COMPONENTS:
        return _Location(file, layer, component, None, copy)
    match = _STRING.fullmatch(component) if layer is None else None
    if match is None or match["side"] == "input":
        raise ValueError(
            f"{file} must edit one of {', '.join(COMPONENTS)} or the output of a module inside a "
            f"block, got {component!r}"
        )
    inside, stack = match["inside"], match["stack"]
    exact = "." in component
    if inside.count("_") > 1 and not exact:
        raise ValueError(
            f"{file} edits {component!r}; without a config.json, its underscores cannot be told "
            "from dots"
        )
    name = f"module:{inside[1:]}" if inside else "block_output"
    return _Location(file, int(match["layer"]), name, stack if exact else None, copy)


def _shared(locations: list[_Location]) -> tuple[str, str | None]:
    """Return the component and the path of the blocks that all locations share."""
    for name in ("component", "stack"):
        kinds: dict[Any, list[str]] = {}
        for location in locations:
            kinds.setdefault(getattr(location, name), []).append(str(location.layer))
        if len(kinds) > 1:
            listed = "; ".join(f"layers {', '.join(ls)}: {kind}" for kind, ls in kinds.items())
            raise ValueError(f"all layers must be edited at the same {name}, got {listed}")
    return locations[0].component, locations[0].stack


# -------------------------------------------------------------------- tensors


def _unit(file: str, tensors: Mapping[str, Tensor]) -> Unit:
    state = {name: value for name, value in tensors.items() if name not in _BUFFERS}
    candidates = _CANDIDATES.get(frozenset(state))
    if candidates is None:
        raise ValueError(
            f"{file} must hold the tensors of one of pyreft's classes "
            f"({', '.join(spec.pyreft for spec in FAMILY.values())}), it holds "
            f"{', '.join(state) or 'nothing'}"
        )
    check_floats(file, state)
    if "rotate_layer" in state:
        rotation = state["rotate_layer"].mT
    elif _ORIGINAL in state:
        original, base = state[_ORIGINAL], state[_BASE]
        if original.ndim != 2 or base.shape != (max(original.shape), max(original.shape)):
            raise ValueError(
                f"{file} must hold {_ORIGINAL} (D, r) and {_BASE} (D, D), got shapes "
                f"{tuple(original.shape)} and {tuple(base.shape)}"
            )
        rotation = orthogonal(original, base).mT
    else:
        rotation = state["proj_layer.weight"]
    constant = state.get("learned_source")
    bias = state.get("bias", state.get("learned_source.bias", constant))
    assert bias is not None
    return Unit(
        source=file,
        candidates=candidates,
        rotation=rotation,
        bias=bias,
        weight=state.get("weight", state.get("learned_source.weight")),
        projection_bias=state.get("proj_layer.bias"),
    )


def _heads(file: Path) -> dict[str, Tensor]:
    """Read the trained parameters of the base model. Refuse those of a PEFT adapter in it."""
    heads = read_tensors(file) if file.exists() else {}
    lora = [name for name in heads if any(part.startswith("lora_") for part in name.split("."))]
    if lora:
        raise ValueError(
            f"{file.name} holds a LoRA of PEFT ({len(lora)} tensors such as {lora[0]}): load it "
            "into PEFT's model by load_state_dict(…, strict=False), and this folder with head=False"
        )
    return heads


def _intervention(classes: Mapping[str, str], requested: str | None) -> str | None:
    """Return the family member that config.json or the caller names."""
    names = sorted({match[1] for text in classes.values() if (match := _CLASS.search(text))})
    by_class = {spec.pyreft: name for name, spec in FAMILY.items()}
    if len(names) > 1:
        raise ValueError(f"all layers must have the same intervention, got {', '.join(names)}")
    if not names:
        return requested
    [name] = names
    known = by_class.get(name)
    if known is None and requested is None:
        raise ValueError(
            f"config.json must name a class of pyreft, got {name!r}; pass intervention= "
            f"({', '.join(FAMILY)}) if its formula is one of them"
        )
    if known is not None and requested not in (None, known):
        raise ValueError(
            f"intervention must be {known!r} or left out, because config.json names {name}; "
            f"got {requested!r}"
        )
    return known or requested
