"""Safe reading of untrusted text: anything but plain files, UTF-8 and JSON is a ValueError.

Python's own readers block on a FIFO, keep the last of duplicate keys, and raise RecursionError for
deeply nested brackets.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, TypeGuard

_SHOWN = 200


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Read the text of a file.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: it is not a plain file (a FIFO, for example), or not UTF-8.
    """
    require_plain(path)
    try:
        return path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def require_plain(path: Path) -> None:
    """Refuse a path that exists and is not a plain file: opening a FIFO would block.

    Raises:
        ValueError: the path is a folder, a FIFO, a socket or a device.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a plain file, it is a folder, a pipe or a device")


def parse_json(text: str) -> Any:
    """Parse JSON text.

    Raises:
        json.JSONDecodeError: the text is not JSON.
        ValueError: it is nested too deeply, or has a duplicate key or a number with thousands of
            digits.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("not readable as JSON: nested too deeply") from None


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is a string that UTF-8 can encode: JSON may hold a lone surrogate."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """Return ``repr(value)`` for a message, truncated if it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested deeply; an integer with thousands of digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        [(name, _)] = counts.most_common(1)
        raise ValueError(f"not readable as JSON: duplicate key {shown(name)} in an object")
    return values
