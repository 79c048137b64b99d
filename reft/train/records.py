"""Data files: JSON or JSONL, with ``prompt`` and ``completion`` or ``text`` and ``label``.

A file that cannot be used is refused as a whole, before any work, with the line to look at.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from reft.safe_read import is_text, parse_json, read_text, shown

#: What a record may hold: field -> the types of its value.
FIELDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "prompt": (str,),
        "completion": (str,),
        "text": (str,),
        "label": (int, float, str),
    }
)

PROMPT_COMPLETION = ("prompt", "completion")
TEXT_LABEL = ("text", "label")

Record = dict[str, Any]


def read_records(
    path: str | os.PathLike[str],
    *,
    required: Sequence[str] = PROMPT_COMPLETION,
    optional: Sequence[str] = (),
) -> list[Record]:
    """Read and check a data file.

    Args:
        path: a ``.jsonl`` file with one object a line, or a ``.json`` file with a list of
            objects. Which of the two is seen from the content; empty lines are skipped.
        required: fields that every record has, from :data:`FIELDS`.
        optional: fields that a record may have beside them.

    Returns:
        The records, in the order of the file.

    Raises:
        FileNotFoundError, IsADirectoryError: nothing to read there.
        ValueError: not JSON (with the line), not an object, a field missing, unknown or of
            another type (with the record and the field), or no record at all.
    """
    source = Path(path)
    if source.is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "a data file is wanted, this is a folder", str(source)
        )
    if not source.exists():
        raise FileNotFoundError(errno.ENOENT, "no such data file", str(source))
    # utf-8-sig: editors on Windows put a byte order mark in front, and json refuses it.
    records = _parse(source, read_text(source, "utf-8-sig"))
    if not records:
        raise ValueError(f"{source} holds no records; each is an object with {_names(required)}")
    for place, record in records:
        _check(f"{source}, {place}", record, required, optional)
    return [record for _, record in records]


def _parse(source: Path, text: str) -> list[tuple[str, Any]]:
    """(where it stands, value) of each record."""
    if text.lstrip().startswith("["):
        try:
            values = parse_json(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}, line {error.lineno}: not JSON: {error.msg}") from None
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        return [(f"record {number}", value) for number, value in enumerate(values, start=1)]
    records = []
    # Not splitlines: JSON text may hold U+2028, which is a line break to Python and none to JSON.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append((f"line {number}", parse_json(line)))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{source}, line {number}: not JSON: {error.msg} (column {error.colno})"
            ) from None
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: {error}") from None
    return records


def _check(place: str, record: Any, required: Sequence[str], optional: Sequence[str]) -> None:
    if not isinstance(record, dict):
        raise ValueError(
            f"{place}: a record is an object with {_names(required)}, got {type(record).__name__}"
        )
    missing = [name for name in required if name not in record]
    if missing:
        has = ", ".join(map(shown, list(record)[:10])) or "no field"
        raise ValueError(f"{place}: field {_names(missing)} is missing, the record has {has}")
    allowed = (*required, *optional)
    unknown = [name for name in record if name not in allowed]
    if unknown:
        raise ValueError(
            f"{place}: unknown field {_names(unknown[:10])}, allowed are {_names(allowed)}"
        )
    for name, value in record.items():
        types = FIELDS[name]
        if not isinstance(value, types) or isinstance(value, bool):
            wanted = " or ".join(one.__name__ for one in types)
            raise ValueError(
                f"{place}: field {name!r} must be of type {wanted}, got {shown(value)}"
            )
        if isinstance(value, str) and not is_text(value):
            raise ValueError(f"{place}: field {name!r} must be text, it holds half a character")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{place}: field {name!r} must be finite, got {value!r}")


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names))
