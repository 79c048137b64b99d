"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Put ``content`` under a name in one step that survives a power cut.

    Whatever moment a kill, a full disk or a power cut picks, a reader finds the old file, or none
    if there was none, or the new one.

    Args:
        path: of the file, in a folder that exists; replaced if it is there.
        content: bytes, or text that is written as UTF-8 without changing its line ends.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    target = Path(path)
    # One name per process: writers that race replace whole files. A leftover goes, and so does a
    # link that somebody else has put there: nothing is written through it.
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
    # The rename itself is in the folder, which has to reach the disk too, and in this order.
    flush_folder(target.parent)


def flush_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
