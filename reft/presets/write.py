"""A preset as TOML that a person can edit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from reft.presets.schema import Preset

_SECTIONS = ("config", "train", "eval", "published")


def to_toml(preset: Preset) -> str:
    """The whole preset, inheriting nothing, with a comment at every value that says where it is
    from. Whoever edits a value should say so in its line under ``[provenance]``."""
    values = preset.to_dict()
    lines = [
        f"# {preset.title}",
        "# Run it: reft train --preset THIS_FILE --model … --data … -o …",
        "",
    ]
    lines += [
        f"{name} = {_value(values[name])}"
        for name in ("name", "title", "task", "method", "model", "hub_id")
    ]
    for section in _SECTIONS:
        lines += ["", f"[{section}]"]
        for name, value in values[section].items():
            if value is None:
                continue
            try:
                origin = f"  # {preset.known_from(f'{section}.{name}').status}"
            except KeyError:
                origin = ""
            lines.append(f"{_key(name)} = {_value(value)}{origin}")
    lines += ["", "[provenance]"]
    lines += [f"{_key(name)} = {_value(text)}" for name, text in values["provenance"].items()]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if name.replace("_", "").isalnum() and name.isascii() else json.dumps(name)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(name)} = {_value(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        # TOML wants a digit on both sides of the point, and so has repr, but for 1e-05.
        return repr(value)
    return str(value)
