"""Changing settings of a preset from text, as ``--set key=value`` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from reft.presets.schema import SECTIONS, EvalSettings, Preset, Provenance, TrainSettings, nearest

_CHANGED = Provenance("changed", "by the user")

#: Settings that hold several values, written with commas.
_SEVERAL = ("seeds", "sets", "layers", "modules_to_save")


def override(preset: Preset, changes: Sequence[str]) -> Preset:
    """A preset with some settings changed; they carry the status "changed" from then on.

    Args:
        preset: stays as it is.
        changes: "train.epochs=3", or "rank=4" where one section alone has the field. Values are
            numbers, true, false, none, names, or several with commas between them.

    Raises:
        ValueError: not of this form; an unknown or ambiguous field; a value that is not allowed.
    """
    if not changes:
        return preset
    values = preset.to_dict()
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"a change must be KEY=VALUE, such as train.epochs=3; got {change!r}")
        section, name = _find(key.strip())
        values[section] = {**values[section], name: _value(name, text.strip())}
        values["provenance"] = {**values["provenance"], f"{section}.{name}": str(_CHANGED)}
    changed = Preset.from_dict(values)
    changed.reft_config()
    _check_names(changed)
    return changed


def settings() -> dict[str, list[str]]:
    """The fields of each section that can be changed."""
    from reft.config import ReftConfig

    kinds = dict(zip(SECTIONS, (ReftConfig, TrainSettings, EvalSettings), strict=True))
    return {
        section: [one.name for one in fields(kind) if one.name != "format_version"]
        for section, kind in kinds.items()
    }


def _find(key: str) -> tuple[str, str]:
    known = settings()
    section, dot, name = key.partition(".")
    if dot:
        if name in known.get(section, ()):
            return section, name
    else:
        found = [one for one, names in known.items() if key in names]
        if len(found) == 1:
            return found[0], key
        if found:
            several = " or ".join(f"{one}.{key}" for one in found)
            raise ValueError(f"setting {key!r} must be {several}")
    every = [f"{one}.{name}" for one, names in known.items() for name in names]
    near = nearest(key, every) or nearest(key, [one.partition(".")[2] for one in every])
    raise ValueError(f"no setting {key!r}{near}; settings are {', '.join(every)}")


def _value(name: str, text: str) -> Any:
    if name in _SEVERAL and "," in text:
        return [_one(part.strip()) for part in text.split(",")]
    value = _one(text)
    return [value] if name in ("seeds", "sets") else value


def _one(text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return float(text)  # 9e-4 is JSON, 1. is not
    except ValueError:
        return text


def _check_names(preset: Preset) -> None:
    """Refuse a decoding, a scoring or a set that the task does not have, before anything runs."""
    from reft.tasks import GenerationTask, get_task

    task = get_task(preset.task)
    wanted: list[tuple[str, str | None, Sequence[str]]] = []
    for one in preset.eval.sets:
        wanted.append(("eval.sets", one, task.eval_sets))
    if isinstance(task, GenerationTask):
        wanted.append(("eval.decoding", preset.eval.decoding, tuple(task.decodings)))
        if preset.eval.scoring is not None:
            wanted.append(("eval.scoring", preset.eval.scoring, tuple(task.scorings)))
    for name, value, allowed in wanted:
        if value not in allowed:
            options = " or ".join(allowed) or "none"
            raise ValueError(f"{name} of the task {task.name} must be {options}, got {value!r}")
