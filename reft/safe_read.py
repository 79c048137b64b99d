"""Reading text that others wrote: what is no plain file, no UTF-8 or no JSON is a ValueError.

Python's own readers wait for ever at a FIFO, take the last of two equal keys, and leave by
RecursionError where brackets are nested too deep.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, TypeGuard

_SHOWN = 200


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a file.

    Raises:
        OSError: it is not there or cannot be read.
        ValueError: it is no plain file, such as a FIFO, or not UTF-8.
    """
    require_plain(path)
    try:
        return path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def require_plain(path: Path) -> None:
    """Refuse what is there and is no plain file: opening a FIFO waits until somebody writes.

    Raises:
        ValueError: a folder, a FIFO, a socket or a device.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a plain file, it is a folder, a pipe or a device")


def parse_json(text: str) -> Any:
    """The value of JSON text.

    Raises:
        json.JSONDecodeError: not JSON.
        ValueError: nested too deep, a number of thousands of digits, a key twice in one object.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deep") from None


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that can be written as UTF-8: JSON may hold half a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """``repr(value)`` for a message, cut where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested deep; an integer of thousands of digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        [(twice, _)] = counts.most_common(1)
        raise ValueError(f"not JSON that can be read: {shown(twice)} stands twice in one object")
    return found
