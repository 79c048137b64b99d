"""The archive of a session's results, and the command ``python -m benchmarks unpack``."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer

from benchmarks.result_rows import RESULTS
from benchmarks.revision import named_commits
from benchmarks.run import stop

#: Largest size of the archive. Lent machines return files of at most 16 MiB.
LIMIT = 15 * 2**20
#: Files to leave out of an archive that would be larger, in this order.
_OPTIONAL = ((".png", "plots"), (".log", "logs"))
#: Suffixes of files that may hold a content id instead of a commit.
_TEXT_SUFFIXES = (".jsonl", ".json", ".md")


def pack(folder: Path, top: str, limit: int = LIMIT) -> tuple[bytes, list[str]]:
    """Pack all files of a folder into a gzipped tar, under ``top/``.

    The last line of a row file is left out while it is incomplete.

    Returns:
        The archive, and what was left out to keep it within ``limit`` bytes: plots, then logs.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    left_out: list[str] = []
    content = _tar(folder, paths, top)
    for suffix, name in _OPTIONAL:
        if len(content) <= limit:
            break
        paths = [path for path in paths if path.suffix != suffix]
        left_out.append(name)
        content = _tar(folder, paths, top)
    return content, left_out


def _tar(folder: Path, paths: Iterable[Path], top: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for path in paths:
            try:
                content, written = path.read_bytes(), path.stat().st_mtime
            except FileNotFoundError:  # being replaced; the next archive has it
                continue
            if path.suffix == ".jsonl":
                content = content[: content.rfind(b"\n") + 1]
            member = tarfile.TarInfo(f"{top}/{path.relative_to(folder).as_posix()}")
            member.size, member.mtime = len(content), int(written)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def unpack_results(
    archive: Annotated[Path, typer.Argument(help="results.tar.gz of `gpu`.")],
    output: Annotated[
        Path,
        typer.Option(
            help="Folder in which to put the folder of the device.", show_default="results"
        ),
    ] = RESULTS,
) -> None:
    """Unpack the results of a session on a GPU into results/<device>."""
    try:
        typer.echo(f"unpacked to {unpack(archive, output)}")
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        stop(f"{archive} was not unpacked: {error}", 2)


def unpack(archive: Path, output: Path) -> Path:
    """Extract an archive of :func:`pack`, and replace content ids by commits that git knows.

    Returns:
        The folder of the device, in ``output``.

    Raises:
        ValueError: the archive holds anything but files of one folder, or it is of a session
            without a GPU and ``output`` is the folder of committed results.
        OSError, tarfile.TarError: the archive cannot be read, or a member lies outside of it.
    """
    with tarfile.open(archive, "r:gz") as tar, tempfile.TemporaryDirectory() as scratch:
        members = tar.getmembers()
        top = _top(members)
        tar.extractall(scratch, members, filter="data")
        source = Path(scratch) / top
        if output.resolve() == RESULTS.resolve() and _is_tiny(source):
            raise ValueError(
                "its session had no GPU, so it holds no results to keep; give --output"
            )
        _name_commits(source)
        shutil.copytree(source, output / top, dirs_exist_ok=True)
    return output / top


def _top(members: Iterable[tarfile.TarInfo]) -> str:
    """The folder that holds all members."""
    tops = set()
    for member in members:
        path = PurePosixPath(member.name)
        if not member.isfile() or path.is_absolute() or ".." in path.parts or len(path.parts) < 2:
            raise ValueError(f"it must hold files of one folder, got {member.name!r}")
        tops.add(path.parts[0])
    if len(tops) != 1:
        raise ValueError(f"it must hold the folder of one device, got {sorted(tops)}")
    return str(tops.pop())


def _is_tiny(folder: Path) -> bool:
    session = folder / "session.json"
    return session.exists() and bool(json.loads(session.read_text(encoding="utf-8"))["tiny"])


def _name_commits(folder: Path) -> None:
    try:
        for path in folder.rglob("*"):
            if path.suffix in _TEXT_SUFFIXES and path.is_file():
                text = path.read_text(encoding="utf-8")
                path.write_text(named_commits(text), encoding="utf-8")
    except (OSError, subprocess.SubprocessError) as error:
        typer.echo(f"content ids are kept, git failed: {error}", err=True)
