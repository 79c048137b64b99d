"""Folders that pyreft wrote: one pickle of tensors for each intervention, and a ``config.json``.

    intkey_layer_15_comp_block_output_unit_pos_nunit_1#0.bin          pyvene 0.1.7 and later
    intkey_layer.15.comp.block_output.unit.pos.nunit.1#0.bin          before
    intkey_comp_model_layers[15]_output_unit_pos_nunit_1#0.bin        a module named by its path

#0 and #1 tell apart several interventions on one layer: with weights of their own for first and
last tokens, #0 is that of the first. pyreft's trainer writes the same files without config.json,
into ``checkpoint-N/intervenable_model``. Positions, activation and dropout are stored nowhere.
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

#: Where pyreft's trainer puts its files.
TRAINER_FOLDER = "intervenable_model"
#: Parameters of the base model that were trained too.
HEADS_FILE = "pytorch_model.bin"

_FILE = re.compile(
    r"intkey_(?:layer[._](?P<layer>\d+)[._])?comp[._](?P<component>.+)"
    r"[._]unit[._](?P<unit>.+)[._]nunit[._]\d+#(?P<copy>\d+)\.bin",
    re.ASCII,
)
_STRING = re.compile(r"(?P<stack>.+)\[(?P<layer>\d+)\](?P<inside>.*)[._](?P<side>input|output)")
_CLASS = re.compile(r"(\w+)'?>?$")

#: The order of the fields of a representation; earlier versions end earlier.
FIELDS = (
    "layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type",
    "intervention", "subspace_partition", "group_key", "intervention_link_key", "moe_key",
    "source_representation", "hidden_source_representation", "latent_dim",
)  # fmt: skip

_BUFFERS = {"embed_dim", "interchange_dim"}
_ORIGINAL = "rotate_layer.parametrizations.weight.original"
_BASE = "rotate_layer.parametrizations.weight.0.base"
_SOURCE = ("learned_source.weight", "learned_source.bias")

#: The tensors of a file -> the members of the family that store such.
_CANDIDATES: dict[frozenset[str], tuple[str, ...]] = {
    frozenset({"weight", "bias", "rotate_layer"}): ("loreft",),
    frozenset({_ORIGINAL, _BASE, *_SOURCE}): ("direft_orthonormal",),
    frozenset({_ORIGINAL, _BASE, "learned_source"}): ("consreft", "lobireft"),
    frozenset({"proj_layer.weight", *_SOURCE}): ("noreft", "direft"),
    frozenset({"proj_layer.weight", "proj_layer.bias", *_SOURCE}): ("noreft", "direft"),
}


@dataclass(frozen=True)
class _Place:
    """Where one intervention acts.

    Attributes:
        file: the name of its file.
        layer: number of its block.
        component: this library's name.
        stack: path of the list of blocks, where the checkpoint names it.
        copy: the number after "#".
    """

    file: str
    layer: int
    component: str
    stack: str | None
    copy: int


def find_pyreft(path: str | os.PathLike[str]) -> Path | None:
    """The folder with pyreft's files: ``path`` itself or its ``intervenable_model``; else None."""
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
    """Read a folder that pyreft wrote; the base model is not needed.

    Args:
        path: the folder, or the ``checkpoint-N`` around it.
        intervention: this library's name, where the folder does not tell it.
        head: read the parameters of the base model that were trained too.
        settings: fields of :class:`ReftConfig` that pyreft does not store; positions at least.

    Raises:
        OSError: no such folder, or no such files in it.
        ValueError: a damaged or foreign file, a field that is not allowed, or what one
            configuration cannot hold.
    """
    ReftConfig(**settings)  # a bad value is refused before anything is read
    folder = _locate(Path(path))
    try:
        places, classes = _from_config(folder) or (_from_names(folder), {})
        # One file at a time: it may hold D × D numbers, of which R is all that is kept.
        units = {
            (place.layer, place.copy): _unit(place.file, read_tensors(folder / place.file))
            for place in places
        }
        if len(units) < len(places):
            raise ValueError("two interventions of one layer have the same number")
        heads = _heads(folder / HEADS_FILE) if head else {}
        component, stack = _shared(places)
        settings["block_path"] = settings.get("block_path") or stack
        return convert(
            units,
            heads,
            intervention=_named(classes, intervention),
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


# -------------------------------------------------------------------- where


def _from_names(folder: Path) -> list[_Place]:
    places = []
    for file in sorted(one.name for one in folder.glob("intkey_*.bin")):
        match = _FILE.fullmatch(file)
        if match is None:
            raise ValueError(f"{file} is not a name that pyreft gives")
        layer = None if match["layer"] is None else int(match["layer"])
        places.append(_place(file, layer, match["component"], match["unit"], int(match["copy"])))
    return places


def _from_config(folder: Path) -> tuple[list[_Place], dict[str, str]] | None:
    """The places that config.json lists and the class of each file; None if there is no such."""
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
            "config.json is damaged, or not one that pyreft wrote (sorted_keys, representations "
            "and intervention_types, one for each file)"
        )
    files = [f"intkey_{key}.bin" for key in keys]
    present = {one.name for one in folder.glob("intkey_*.bin")}
    missing, unknown = sorted(set(files) - present), sorted(present - set(files))
    if missing or unknown:
        raise ValueError(
            "config.json must list the files that are there; missing: "
            f"{', '.join(missing) or 'none'}, not listed: {', '.join(unknown) or 'none'}"
        )
    if copies != sorted(copies):
        # pyreft hands the first half of all interventions the first tokens.
        raise ValueError(
            "config.json must list every #0 before every #1, or pyreft edited first tokens with "
            "some of both"
        )
    places = []
    for file, copy, row in zip(files, copies, rows, strict=True):
        if row.get("intervention_link_key") is not None:
            raise ValueError(
                f"{file} is linked to other layers (intervention_link_key "
                f"{shown(row['intervention_link_key'])}); this library has weights for each layer"
            )
        component = row["component"]
        layer = None if "." in component else row["layer"]
        places.append(_place(file, layer, component, str(row.get("unit", "pos")), copy))
    return places, dict(zip(files, (str(one)[:1000] for one in types), strict=True))


def _is_row(row: Mapping[str, Any]) -> bool:
    """Whether a representation says a component, and a layer if that is no path."""
    component, layer = row.get("component"), row.get("layer")
    named = isinstance(component, str) and len(component) < 1000
    return named and ("." in str(component) or (type(layer) is int and layer >= 0))


def _place(file: str, layer: int | None, component: str, unit: str, copy: int) -> _Place:
    if unit != "pos":
        raise ValueError(f'{file} edits units "{unit}"; only "pos", single tokens, can be read')
    if layer is not None and component in COMPONENTS:
        return _Place(file, layer, component, None, copy)
    match = _STRING.fullmatch(component) if layer is None else None
    if match is None or match["side"] == "input":
        raise ValueError(
            f"{file} edits {component!r}; this library edits {', '.join(COMPONENTS)} and the "
            "outputs of modules inside a block"
        )
    inside, stack = match["inside"], match["stack"]
    exact = "." in component
    if inside.count("_") > 1 and not exact:
        raise ValueError(
            f"{file} edits {component!r}, of which only a config.json would tell the dots from the "
            "underscores"
        )
    name = f"module:{inside[1:]}" if inside else "block_output"
    return _Place(file, int(match["layer"]), name, stack if exact else None, copy)


def _shared(places: list[_Place]) -> tuple[str, str | None]:
    """(component, path of the blocks) of every place."""
    for name in ("component", "stack"):
        kinds: dict[Any, list[str]] = {}
        for place in places:
            kinds.setdefault(getattr(place, name), []).append(str(place.layer))
        if len(kinds) > 1:
            listed = "; ".join(f"layers {', '.join(ls)}: {kind}" for kind, ls in kinds.items())
            raise ValueError(f"all layers must be edited at the same {name}, got {listed}")
    return places[0].component, places[0].stack


# -------------------------------------------------------------------- what


def _unit(file: str, tensors: Mapping[str, Tensor]) -> Unit:
    found = {name: value for name, value in tensors.items() if name not in _BUFFERS}
    candidates = _CANDIDATES.get(frozenset(found))
    if candidates is None:
        raise ValueError(
            f"{file} must hold the tensors of one of pyreft's classes "
            f"({', '.join(spec.pyreft for spec in FAMILY.values())}), it holds "
            f"{', '.join(found) or 'nothing'}"
        )
    check_floats(file, found)
    if "rotate_layer" in found:
        rotation = found["rotate_layer"].mT
    elif _ORIGINAL in found:
        original, base = found[_ORIGINAL], found[_BASE]
        if original.ndim != 2 or base.shape != (max(original.shape), max(original.shape)):
            raise ValueError(
                f"{file} must hold {_ORIGINAL} (D, r) and {_BASE} (D, D), got shapes "
                f"{tuple(original.shape)} and {tuple(base.shape)}"
            )
        rotation = orthogonal(original, base).mT
    else:
        rotation = found["proj_layer.weight"]
    constant = found.get("learned_source")
    bias = found.get("bias", found.get("learned_source.bias", constant))
    assert bias is not None
    return Unit(
        source=file,
        candidates=candidates,
        rotation=rotation,
        bias=bias,
        weight=found.get("weight", found.get("learned_source.weight")),
        projection_bias=found.get("proj_layer.bias"),
    )


def _heads(file: Path) -> dict[str, Tensor]:
    """The trained parameters of the base model; of a PEFT adapter in it they are PEFT's."""
    found = read_tensors(file) if file.exists() else {}
    lora = [name for name in found if any(part.startswith("lora_") for part in name.split("."))]
    if lora:
        raise ValueError(
            f"{file.name} holds a LoRA of PEFT ({len(lora)} tensors such as {lora[0]}): load it "
            "into PEFT's model by load_state_dict(…, strict=False), and this folder with head=False"
        )
    return found


def _named(classes: Mapping[str, str], asked: str | None) -> str | None:
    """The member of the family that config.json names, or the caller."""
    names = sorted({match[1] for one in classes.values() if (match := _CLASS.search(one))})
    by_class = {spec.pyreft: name for name, spec in FAMILY.items()}
    if len(names) > 1:
        raise ValueError(f"all layers must have the same intervention, got {', '.join(names)}")
    if not names:
        return asked
    [name] = names
    known = by_class.get(name)
    if known is None and asked is None:
        raise ValueError(
            f"config.json names the class {name!r}, which is none of pyreft's; say "
            f"intervention= ({', '.join(FAMILY)}) if its formula is one of them"
        )
    if known is not None and asked not in (None, known):
        raise ValueError(
            f"intervention must be {known!r} or left out, config.json names {name}; got {asked!r}"
        )
    return known or asked
