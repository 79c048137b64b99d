"""The state of the measured code: a commit, or content ids in a copy without ``.git``."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: The packages whose tree ids identify a state of the code without git.
PACKAGES = ("reft_kernels", "reft")
#: Number of commits to search for a content id.
_COMMITS = 300
_DIGITS = 12
_CONTENT_ID = re.compile(rf"tree-([0-9a-f]{{{_DIGITS}}})-([0-9a-f]{{{_DIGITS}}})")


def commit(root: Path = ROOT) -> str | None:
    """The name of the state of the code in result rows.

    This is the variable REFT_COMMIT if it is set. Else it is the commit of the checkout, with ``+``
    if a file of the packages differs from it, or None if git fails. Without ``.git`` it is the
    :func:`content_id`.
    """
    override = os.environ.get("REFT_COMMIT")
    if override:
        return override
    if not (root / ".git").exists():
        return content_id(root)
    try:
        changed = _git(root, "status", "--porcelain", "--", *PACKAGES, "benchmarks/*.py")
        return _git(root, "rev-parse", f"--short={_DIGITS}", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def content_id(root: Path = ROOT) -> str:
    """``tree-<12 digits>-<12 digits>``: the abbreviated git ids of the packages' trees."""
    return "-".join(["tree", *(tree_id(root / name).hex()[:_DIGITS] for name in PACKAGES)])


def tree_id(folder: Path) -> bytes:
    """The git id (SHA-1, 20 bytes) of a folder; compiled Python is left out."""
    entries = []
    for path in folder.iterdir():
        if path.name == "__pycache__" or path.suffix == ".pyc":
            continue
        if path.is_symlink():
            mode, digest = "120000", _object_id("blob", os.fsencode(path.readlink()))
        elif path.is_dir():
            files = (file for file in path.rglob("*") if "__pycache__" not in file.parts)
            if not any(file.is_file() for file in files):
                continue  # git does not track empty folders
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
    """Replace each content id in a text by the newest commit whose packages have these trees.

    The last 300 commits of the checkout at ``root`` are searched; an id that none of them has is
    kept.

    Raises:
        OSError, subprocess.SubprocessError: git fails.
    """
    ids = set(_CONTENT_ID.findall(text))
    commits = _commits_of(ids, root) if ids else {}

    def name(match: re.Match[str]) -> str:
        return commits.get((match[1], match[2]), match[0])

    return _CONTENT_ID.sub(name, text)


def _commits_of(trees: Iterable[tuple[str, str]], root: Path) -> dict[tuple[str, str], str]:
    hashes = _git(root, "log", f"-{_COMMITS}", "--format=%H").split()
    paths = "".join(f"{commit_hash}:{name}\n" for commit_hash in hashes for name in PACKAGES)
    ids = _git(root, "cat-file", "--batch-check=%(objectname)", stdin=paths).splitlines()
    known: dict[tuple[str, str], str] = {}
    for number, commit_hash in enumerate(hashes):
        first, second = ids[2 * number : 2 * number + 2]
        known.setdefault((first[:_DIGITS], second[:_DIGITS]), commit_hash[:_DIGITS])
    return {pair: known[pair] for pair in trees if pair in known}


def _object_id(kind: str, content: bytes) -> bytes:
    head = f"{kind} {len(content)}\0".encode()
    return hashlib.sha1(head + content, usedforsecurity=False).digest()


def _git(root: Path, *arguments: str, stdin: str | None = None) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return done.stdout.strip()
