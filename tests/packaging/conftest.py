"""The wheel, built once from a copy of the sources: the checkout's ``build/`` is not in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("reft", "reft_kernels")


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """What a build reads, and folders that it must leave out."""
    folder = tmp_path_factory.mktemp("sources")
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
    for name in (*PACKAGES, "tests/meta", "benchmarks", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="session")
def wheel(sources, tmp_path_factory) -> Path:
    """What ``pip wheel`` makes of the sources, with the environment's own setuptools."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(sources), "--wheel-dir", str(folder)]
    done = subprocess.run(
        [*command, "--no-deps", "--no-build-isolation", "--quiet"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (made,) = folder.iterdir()
    return made
