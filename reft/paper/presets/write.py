"""A preset as TOML that a person can edit."""

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
# What you change counts as changed, no longer as the paper's: it is compared with the preset that
# copy_of names. [provenance] says for programs what the comments say.

"""


def to_toml(preset: Preset) -> str:
    """The whole preset, inheriting nothing, with comments that say where each value is from.

    :func:`reft.paper.presets.load` of a file with this text gives the preset again.
    """
    values = preset.to_dict()
    lines = [f"{name} = {_value(values[name])}" for name in PRESET_CHECKS]
    lines.append(f"copy_of = {_value(preset.name)}")
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        said = ""
        given = {name: value for name, value in values[section].items() if value is not None}
        for name, value in given.items():
            origin = str(preset.known_from(f"{section}.{name}"))
            if origin != said:
                said = origin
                lines += textwrap.wrap(said, 98, initial_indent="# ", subsequent_indent="#   ")
            lines.append(f"{_key(name)} = {_value(value)}")
        # TOML has no word for none.
        lines += [f"# {name}: none" for name in values[section] if name not in given]
    lines += ["", "[provenance]"]
    lines += [f"{_key(name)} = {_value(text)}" for name, text in values["provenance"].items()]
    return _HEAD.format(title=preset.title) + "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        rows = ", ".join(f"{_key(name)} = {_value(one)}" for name, one in value.items())
        return f"{{ {rows} }}" if rows else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    # JSON's booleans, numbers and texts are TOML's too, but for one character.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")
