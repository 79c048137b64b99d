"""Changes of a preset's settings from text, as in ``--set key=value``."""

from __future__ import annotations

import tomllib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from reft.field_checks import did_you_mean
from reft.paper.presets.preset import SECTIONS, SETTINGS, Preset, Provenance
from reft.paper.presets.settings import EvalSettings, TrainSettings

#: Fields of ReftConfig that are not settings of a run.
_NOT_SETTINGS = ("base_model_name_or_path", "format_version")

_BOOLEANS = {"true": True, "false": False}


def override(preset: Preset, changes: Sequence[str]) -> Preset:
    """Change settings of a preset; changed settings get the status "changed".

    Args:
        preset: the original, not modified.
        changes: "train.epochs=3", or "epochs=3"; a name that several sections have
            (``batch_size``, ``max_records``, ``dtype``) means the setting of ``train``. Values are
            numbers, true, false, none, names, or a list with commas ("seeds=42,43"); layers are
            separated by semicolons ("layers=3;9").

    Raises:
        ValueError: a change of another form, an unknown setting, or a bad value.
    """
    if not changes:
        return preset
    known, values = settings(), preset.to_dict()
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"a change must be KEY=VALUE, such as train.epochs=3; got {change!r}")
        section, name = _find_setting(key.strip(), known)
        values[section] = {**values[section], name: value_of(text.strip(), known[section][name])}
    changed = Preset.from_dict({**values, "config": _config(values["config"])})
    return mark_changes(changed, preset, "by --set")


def mark_changes(preset: Preset, original: Preset, how: str) -> Preset:
    """Mark each value of a preset that differs from ``original`` as changed."""
    provenance = dict(preset.provenance)
    new, old = _flat_values(preset), _flat_values(original)
    for name in dict.fromkeys([*new, *old]):
        marked = name in provenance and provenance[name].status == "changed"
        if new.get(name) != old.get(name) and not marked:
            provenance[name] = Provenance("changed", f"{how}; it was {_shown(old.get(name))}")
    values = {**preset.to_dict(), "provenance": {name: str(v) for name, v in provenance.items()}}
    return Preset.from_dict(values)


def settings() -> dict[str, dict[str, Any]]:
    """Return the type of each setting by section and name."""
    from reft.config import ReftConfig

    kinds = dict(zip(SETTINGS, (ReftConfig, TrainSettings, EvalSettings), strict=True))
    return {
        section: {
            name: hint for name, hint in get_type_hints(kind).items() if name not in _NOT_SETTINGS
        }
        for section, kind in kinds.items()
    }


def value_of(text: str, hint: Any) -> Any:
    """Parse text as a value of a type.

    Text that cannot be parsed is returned unchanged; the check of the field refuses it.
    """
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
        return _read(lambda literal: tomllib.loads(f"value = {literal}")["value"], text)
    for several in (tuple, Sequence):
        # ReftConfig parses the text of layers.
        if several in origins and (str not in origins):
            inner = get_args(origins[several])[0]
            return [value_of(part.strip(), inner) for part in text.split(",")]
    return text


def _find_setting(key: str, known: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    section, dot, name = key.partition(".")
    if dot and name in known.get(section, ()):
        return section, name
    sections = [section for section, names in known.items() if key in names]
    if sections:
        return ("train" if "train" in sections else sections[0]), key
    every = [f"{section}.{name}" for section, names in known.items() for name in names]
    candidates = every if dot else [name for names in known.values() for name in names]
    raise ValueError(
        f"no setting {key!r}{did_you_mean(key, candidates)}; settings are {', '.join(every)}"
    )


def _config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the fields with :class:`reft.ReftConfig`, and return them as it keeps them."""
    from reft.config import ReftConfig

    checked = ReftConfig.from_dict(values).to_dict()
    return {name: checked[name] for name in values}


def _flat_values(preset: Preset) -> dict[str, Any]:
    """Return all values by dotted name, with the defaults of missing fields of ReftConfig."""
    values = preset.to_dict() | {"config": preset.reft_config().to_dict()}
    flat = {name: values[name] for name in ("task", "hub_id")}
    for section in SECTIONS:
        flat |= {f"{section}.{name}": value for name, value in values[section].items()}
    return flat


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if value in (True, False) else str(value)


def _read(reader: Callable[[str], Any], text: str) -> Any:
    try:
        return reader(text)
    except ValueError:
        return text
