"""Presets from the tables of this package, and from files of the user's."""

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

#: In the order of the paper.
_TABLES = ("commonsense", "arithmetic", "instruct", "glue", "ablation", "demos")

#: Sections that a preset shares with the one that it inherits from, entry by entry.
_MERGED = ("config", "train", "eval", "provenance")


def names() -> list[str]:
    """The names of all presets, in the order of the paper."""
    return list(_tables())


def load(name: str | os.PathLike[str]) -> Preset:
    """A preset by name, or from a TOML file that ``reft presets copy`` wrote.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: no preset of this name, with the nearest; a file that is not a preset.
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
    """A preset from a file.

    What differs from the preset named by ``copy_of`` counts as changed, whatever the file says of
    where it is from.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: not TOML, or not one preset.
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
    """A preset with all that it inherits.

    A preset that says where a whole section is from ("config") replaces what its parent says of
    each field in it. One line may speak of several fields ("config.rank, config.layers").

    Raises:
        ValueError: it inherits from a preset that is not there, or from itself.
    """
    chain: list[Mapping[str, Any]] = []
    at: str | None = name
    seen: list[str] = []
    while at is not None:
        if at in seen or at not in tables:
            raise ValueError(f"preset {name} inherits from {at!r}, which is itself or not there")
        seen.append(at)
        chain.append(tables[at])
        at = tables[at].get("inherits")
    whole: dict[str, Any] = {}
    for part in reversed(chain):
        new = {key: value for key, value in part.items() if key != "inherits"}
        for section in _MERGED:
            kept = dict(whole.get(section, {}))
            own = new.get(section, {})
            if section == "provenance":
                own = _each(own)
                kept = {
                    key: value for key, value in kept.items() if key.partition(".")[0] not in own
                }
            new[section] = {**kept, **own}
        whole = {**whole, **new}
    return whole


def _each(provenance: Mapping[str, str]) -> dict[str, str]:
    return {name.strip(): text for names, text in provenance.items() for name in names.split(",")}


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for table in _TABLES:
        path = _FOLDER / f"{table}.toml"
        for one in tomllib.loads(path.read_text(encoding="utf-8"))["preset"]:
            if one["name"] in found:
                raise ValueError(f"{path} names {one['name']} a second time")
            found[one["name"]] = one
    return found
