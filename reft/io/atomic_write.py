"""Atomic replacement of files."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file in one atomic step that survives a power cut.

    If the process is killed, the disk is full or the power fails, a reader finds the complete old
    file (or none, if there was none) or the complete new one.

    Args:
        path: a file in an existing folder; an existing file is replaced.
        content: bytes, or text that is written as UTF-8 with its line ends unchanged.

    Raises:
        OSError: the file cannot be written; the old file is unchanged.
    """
    target = Path(path)
    # One temporary name per process, so that racing writers replace complete files. A leftover is
    # removed first, and so is a symbolic link, which must not be written through.
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)
    try:
        with open(beside, "xb") as file:  # noqa: PTH123
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)  # noqa: PTH105
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    # The rename is an entry of the folder, which must reach the disk after the file.
    flush_folder(target.parent)


def flush_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
