"""Presets as TOML files to edit."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from reft.paper.presets.preset import PRESET_CHECKS, SECTIONS, Preset

_BARE = re.compile(r"[A-Za-z0-9_-]+")

_HEAD = """\
# {title}
# Run it: reft train --preset THIS_FILE --output FOLDER
# Settings that differ from the preset named by copy_of are marked as changed, not as the paper's.
# [provenance] repeats the comments for programs.

"""


def to_toml(preset: Preset) -> str:
    """Write all values of a preset as TOML, with comments that give the source of each value.

    :func:`reft.paper.presets.load` restores the preset from a file with this text.
    """
    values = preset.to_dict()
    lines = [f"{name} = {_value(values[name])}" for name in PRESET_CHECKS]
    lines.append(f"copy_of = {_value(preset.name)}")
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        written = ""
        given = {name: value for name, value in values[section].items() if value is not None}
        for name, value in given.items():
            origin = str(preset.known_from(f"{section}.{name}"))
            if origin != written:
                written = origin
                lines += textwrap.wrap(origin, 98, initial_indent="# ", subsequent_indent="#   ")
            lines.append(f"{_key(name)} = {_value(value)}")
        # TOML has no null.
        lines += [f"# {name}: none" for name in values[section] if name not in given]
    lines += ["", "[provenance]"]
    lines += [f"{_key(name)} = {_value(text)}" for name, text in values["provenance"].items()]
    return _HEAD.format(title=preset.title) + "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        rows = ", ".join(f"{_key(name)} = {_value(entry)}" for name, entry in value.items())
        return f"{{ {rows} }}" if rows else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    # Booleans, numbers and strings of JSON are valid TOML, except for one character.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")
