"""Loading of presets from this package and from files of the user."""

from __future__ import annotations

import copy
import functools
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reft.field_checks import did_you_mean
from reft.paper.presets.change import mark_changes
from reft.paper.presets.preset import Preset
from reft.safe_read import read_text

_FOLDER = Path(__file__).parent

#: TOML files in the order of the paper.
_TABLE_FILES = ("commonsense", "arithmetic", "instruct", "glue", "ablation", "demos")

#: Sections that are merged entry by entry with those of the inherited preset.
_MERGED = ("config", "train", "eval", "provenance")


def names() -> list[str]:
    """Return the names of all presets in the order of the paper."""
    return list(_tables())


def load(name: str | os.PathLike[str]) -> Preset:
    """Load a preset by name, or from a TOML file of ``reft presets copy``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: there is no preset of this name, or the file is not a preset.
    """
    text = os.fspath(name)
    if text in _tables():
        return Preset.from_dict(copy.deepcopy(resolve(text, _tables())))
    if text.endswith(".toml") or Path(text).is_file():
        return read(Path(text))
    raise ValueError(
        f"no preset {text!r}{did_you_mean(text, _tables())}; `reft presets list` "
        "lists them, and the name of a preset file ends in .toml"
    )


def read(path: Path) -> Preset:
    """Read a preset from a file.

    Values that differ from the preset named by ``copy_of`` are marked as changed, whatever source
    the file gives for them.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not TOML, or not a preset.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such preset file: {path}")
    try:
        values = tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    original = str(values.pop("copy_of", values.get("name")))
    try:
        preset = Preset.from_dict(values)
        preset.reft_config()
        if original in _tables():
            preset = mark_changes(preset, load(original), f"in {path.name}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return preset


def resolve(name: str, tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Merge a preset with the presets that it inherits from.

    Provenance for a whole section ("config") replaces the parent's provenance of its fields. A key
    may name several fields ("config.rank, config.layers").

    Raises:
        ValueError: the preset inherits from itself or from an unknown preset.
    """
    chain: list[Mapping[str, Any]] = []
    current: str | None = name
    seen: list[str] = []
    while current is not None:
        if current in seen or current not in tables:
            raise ValueError(
                f"preset {name} inherits from {current!r}, which is unknown or the preset itself"
            )
        seen.append(current)
        chain.append(tables[current])
        current = tables[current].get("inherits")
    whole: dict[str, Any] = {}
    for part in reversed(chain):
        new = {key: value for key, value in part.items() if key != "inherits"}
        for section in _MERGED:
            inherited = dict(whole.get(section, {}))
            entries = new.get(section, {})
            if section == "provenance":
                entries = _split_names(entries)
                inherited = {
                    key: value
                    for key, value in inherited.items()
                    if key.partition(".")[0] not in entries
                }
            new[section] = {**inherited, **entries}
        whole = {**whole, **new}
    return whole


def _split_names(provenance: Mapping[str, str]) -> dict[str, str]:
    return {name.strip(): text for names, text in provenance.items() for name in names.split(",")}


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    presets: dict[str, dict[str, Any]] = {}
    for table in _TABLE_FILES:
        path = _FOLDER / f"{table}.toml"
        for preset in tomllib.loads(path.read_text(encoding="utf-8"))["preset"]:
            if preset["name"] in presets:
                raise ValueError(f"{path}: duplicate preset {preset['name']}")
            presets[preset["name"]] = preset
    return presets
