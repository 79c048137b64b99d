"""Changing settings of a preset from text, as ``--set key=value`` does."""

from __future__ import annotations

import tomllib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from reft.field_checks import did_you_mean
from reft.paper.presets.preset import SECTIONS, SETTINGS, Preset, Provenance
from reft.paper.presets.settings import EvalSettings, TrainSettings

#: Fields of ReftConfig that are not settings of a run.
_NO_SETTINGS = ("base_model_name_or_path", "format_version")

_BOOLEANS = {"true": True, "false": False}


def override(preset: Preset, changes: Sequence[str]) -> Preset:
    """A preset with some settings changed; they carry the status "changed" from then on.

    Args:
        preset: stays as it is.
        changes: "train.epochs=3", or "epochs=3" alone; where several sections have the field
            (``batch_size``, ``max_records``, ``dtype``), the bare name is that of ``train``.
            Values are numbers, true, false, none, names, or several of them with commas between,
            "seeds=42,43"; layers as in "layers=3;9".

    Raises:
        ValueError: not of this form; no such setting, with the nearest; a value that is not
            allowed.
    """
    if not changes:
        return preset
    known, values = settings(), preset.to_dict()
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"a change must be KEY=VALUE, such as train.epochs=3; got {change!r}")
        section, name = _find(key.strip(), known)
        values[section] = {**values[section], name: value_of(text.strip(), known[section][name])}
    changed = Preset.from_dict({**values, "config": _config(values["config"])})
    return mark_changes(changed, preset, "by --set")


def mark_changes(preset: Preset, original: Preset, how: str) -> Preset:
    """The same preset, saying of each value that differs from ``original`` that it was changed."""
    provenance = dict(preset.provenance)
    one, other = _comparable(preset), _comparable(original)
    for name in [*one, *(name for name in other if name not in one)]:
        if one.get(name) != other.get(name) and provenance.get(name, _NOWHERE).status != "changed":
            provenance[name] = Provenance("changed", f"{how}; it was {_shown(other.get(name))}")
    values = {**preset.to_dict(), "provenance": {name: str(v) for name, v in provenance.items()}}
    return Preset.from_dict(values)


def settings() -> dict[str, dict[str, Any]]:
    """Section -> setting -> its type."""
    from reft.config import ReftConfig

    kinds = dict(zip(SETTINGS, (ReftConfig, TrainSettings, EvalSettings), strict=True))
    return {
        section: {
            name: hint for name, hint in get_type_hints(kind).items() if name not in _NO_SETTINGS
        }
        for section, kind in kinds.items()
    }


def value_of(text: str, hint: Any) -> Any:
    """Text as a value of a type. What cannot be read stays text: the check of the field refuses it
    and says what is allowed."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    origins = {get_origin(kind) or kind: kind for kind in kinds}
    if type(None) in origins and text.lower() in ("none", "null"):
        return None
    if bool in origins:
        return _BOOLEANS.get(text.lower(), text)
    for number in (int, float):
        if number in origins:
            return _read(number, text)
    if Mapping in origins:
        return _read(lambda one: tomllib.loads(f"it = {one}")["it"], text)
    for several in (tuple, Sequence):
        # Of layers ReftConfig reads the text itself.
        if several in origins and (str not in origins):
            inner = get_args(origins[several])[0]
            return [value_of(part.strip(), inner) for part in text.split(",")]
    return text


_NOWHERE = Provenance("", "")


def _find(key: str, known: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    section, dot, name = key.partition(".")
    if dot and name in known.get(section, ()):
        return section, name
    found = [one for one, names in known.items() if key in names]
    if found:
        return ("train" if "train" in found else found[0]), key
    every = [f"{section}.{name}" for section, names in known.items() for name in names]
    candidates = every if dot else [name for names in known.values() for name in names]
    raise ValueError(
        f"no setting {key!r}{did_you_mean(key, candidates)}; settings are {', '.join(every)}"
    )


def _config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields as :class:`reft.ReftConfig` keeps them, after its checks."""
    from reft.config import ReftConfig

    checked = ReftConfig.from_dict(values).to_dict()
    return {name: checked[name] for name in values}


def _comparable(preset: Preset) -> dict[str, Any]:
    """Dotted name -> value, fields of ReftConfig that are not given as their defaults."""
    values = preset.to_dict() | {"config": preset.reft_config().to_dict()}
    found = {name: values[name] for name in ("task", "hub_id")}
    for section in SECTIONS:
        found |= {f"{section}.{name}": value for name, value in values[section].items()}
    return found


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if value in (True, False) else str(value)


def _read(reader: Callable[[str], Any], text: str) -> Any:
    try:
        return reader(text)
    except ValueError:
        return text
