"""The state of the code that a number was measured on, in a checkout or a copy without ``.git``."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: The packages whose trees name a state of the code where there is no git.
PACKAGES = ("reft_kernels", "reft")
#: So many commits back a content id is looked for.
_COMMITS = 300
_DIGITS = 12
_CONTENT_ID = re.compile(rf"tree-([0-9a-f]{{{_DIGITS}}})-([0-9a-f]{{{_DIGITS}}})")


def commit(root: Path = ROOT) -> str | None:
    """What rows call the state of the code.

    The variable REFT_COMMIT if set; else the checkout's commit, with ``+`` if a file of the
    packages differs from it; else, without ``.git``, the :func:`content_id`. None if git fails.
    """
    given = os.environ.get("REFT_COMMIT")
    if given:
        return given
    if not (root / ".git").exists():
        return content_id(root)
    try:
        changed = _git(root, "status", "--porcelain", "--", *PACKAGES, "benchmarks/*.py")
        return _git(root, "rev-parse", f"--short={_DIGITS}", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def content_id(root: Path = ROOT) -> str:
    """``tree-<12 digits>-<12 digits>``: the beginnings of git's ids of the packages' trees."""
    return "-".join(["tree", *(tree_id(root / name).hex()[:_DIGITS] for name in PACKAGES)])


def tree_id(folder: Path) -> bytes:
    """The SHA-1 that git gives a folder, 20 bytes; compiled Python is left out."""
    entries = []
    for path in folder.iterdir():
        if path.name == "__pycache__" or path.suffix == ".pyc":
            continue
        if path.is_symlink():
            mode, digest = "120000", _object_id("blob", os.fsencode(path.readlink()))
        elif path.is_dir():
            if not any(one.is_file() for one in path.rglob("*") if "__pycache__" not in one.parts):
                continue  # git knows no empty folders
            mode, digest = "40000", tree_id(path)
        else:
            mode = "100755" if path.stat().st_mode & 0o100 else "100644"
            digest = _object_id("blob", path.read_bytes())
        name = os.fsencode(path.name)
        # git sorts a folder as if its name ended in a slash.
        entries.append((name + (b"/" if mode == "40000" else b""), mode, name, digest))
    lines = (
        mode.encode() + b" " + name + b"\0" + digest for _, mode, name, digest in sorted(entries)
    )
    return _object_id("tree", b"".join(lines))


def named_commits(text: str, root: Path = ROOT) -> str:
    """A text with each content id in it replaced by the commit whose packages have these trees.

    The newest of the last 300 commits of the checkout at ``root`` that has them; an id that none
    of them has stays as it is.

    Raises:
        OSError, subprocess.SubprocessError: git fails.
    """
    wanted = set(_CONTENT_ID.findall(text))
    commits = _commits_of(wanted, root) if wanted else {}

    def name(match: re.Match[str]) -> str:
        return commits.get((match[1], match[2]), match[0])

    return _CONTENT_ID.sub(name, text)


def _commits_of(trees: Iterable[tuple[str, str]], root: Path) -> dict[tuple[str, str], str]:
    hashes = _git(root, "log", f"-{_COMMITS}", "--format=%H").split()
    asked = "".join(f"{one}:{name}\n" for one in hashes for name in PACKAGES)
    answers = _git(root, "cat-file", "--batch-check=%(objectname)", given=asked).splitlines()
    known: dict[tuple[str, str], str] = {}
    for number, one in enumerate(hashes):
        first, second = answers[2 * number : 2 * number + 2]
        known.setdefault((first[:_DIGITS], second[:_DIGITS]), one[:_DIGITS])
    return {one: known[one] for one in trees if one in known}


def _object_id(kind: str, content: bytes) -> bytes:
    head = f"{kind} {len(content)}\0".encode()
    return hashlib.sha1(head + content, usedforsecurity=False).digest()


def _git(root: Path, *arguments: str, given: str | None = None) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        input=given,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return done.stdout.strip()
