"""Data files: JSON or JSONL, with ``prompt`` and ``completion`` or ``text`` and ``label``.

A file is checked completely when it is read; an error names the line or record.
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

#: Fields of a record -> the types of their values.
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
        path: a JSONL file with one object per line, or a JSON file with a list of objects. The
            content decides which, not the file's name. Empty lines are skipped.
        required: fields that every record must have, from :data:`FIELDS`.
        optional: fields that a record may have as well.

    Returns:
        The records, in the order of the file.

    Raises:
        FileNotFoundError, IsADirectoryError: ``path`` is not a file.
        ValueError: a line is not JSON; a record is not an object; a field is missing, unknown or of
            another type; or there is no record.
    """
    source = Path(path)
    if source.is_dir():
        raise IsADirectoryError(errno.EISDIR, "path must be a data file, got a folder", str(source))
    if not source.exists():
        raise FileNotFoundError(errno.ENOENT, "no such data file", str(source))
    # utf-8-sig: editors on Windows begin files with a byte order mark, which json refuses.
    records = _parse(source, read_text(source, "utf-8-sig"))
    if not records:
        raise ValueError(f"{source} holds no records; each is an object with {_names(required)}")
    for location, record in records:
        _check(f"{source}, {location}", record, required, optional)
    return [record for _, record in records]


def _parse(source: Path, text: str) -> list[tuple[str, Any]]:
    """Return (line or record number, value) of each record."""
    if text.lstrip().startswith("["):
        try:
            values = parse_json(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}, line {error.lineno}: not JSON: {error.msg}") from None
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        return [(f"record {number}", value) for number, value in enumerate(values, start=1)]
    records = []
    # Not splitlines: Python splits at U+2028, which JSON strings may contain.
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


def _check(location: str, record: Any, required: Sequence[str], optional: Sequence[str]) -> None:
    if not isinstance(record, dict):
        raise ValueError(
            f"{location}: a record must be an object with {_names(required)}, got "
            f"{type(record).__name__}"
        )
    missing = [name for name in required if name not in record]
    if missing:
        present = ", ".join(map(shown, list(record)[:10])) or "no field"
        raise ValueError(
            f"{location}: field {_names(missing)} is missing, the record has {present}"
        )
    allowed = (*required, *optional)
    unknown = [name for name in record if name not in allowed]
    if unknown:
        raise ValueError(
            f"{location}: unknown field {_names(unknown[:10])}, allowed are {_names(allowed)}"
        )
    for name, value in record.items():
        types = FIELDS[name]
        if not isinstance(value, types) or isinstance(value, bool):
            expected = " or ".join(kind.__name__ for kind in types)
            raise ValueError(
                f"{location}: field {name!r} must be of type {expected}, got {shown(value)}"
            )
        if isinstance(value, str) and not is_text(value):
            raise ValueError(
                f"{location}: field {name!r} must be text, it holds an unpaired surrogate"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{location}: field {name!r} must be finite, got {value!r}")


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names))
