"""User errors and their messages."""

from __future__ import annotations

import os
from pathlib import Path


class UserError(Exception):
    """An error that the user can correct. Printed as one line on stderr, with exit code 2."""


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line, without the prefix ``[Errno 2]``."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(text.split()) or type(error).__name__


def check_folder(path: Path) -> None:
    """Refuse a folder that cannot be written to or created. Nothing is created."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"cannot write to {path}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {path}: no permission for {existing}")


def check_file(path: Path) -> None:
    """Refuse a file that cannot be written. Nothing is created."""
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    check_folder(path.absolute().parent)
