"""What a user did wrong, in one line."""

from __future__ import annotations

import tempfile
from pathlib import Path


class UserError(Exception):
    """Something the user can put right. Shown as one line on stderr; the exit code is 2."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line, without Python's ``[Errno 2]`` in front."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(text.split()) or type(error).__name__


def writable_folder(path: Path) -> Path:
    """``path`` as a folder that can be written to, made if missing; found out before any work."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from None


def writable_file(path: Path) -> Path:
    """``path`` as a file that can be written, with its folder made if missing."""
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    writable_folder(path.parent)
    return path
