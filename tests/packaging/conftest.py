"""The wheel, built once from a copy of the sources without the checkout's ``build/``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("reft", "reft_kernels")


@pytest.fixture(scope="session")
def sources(made_once) -> Path:
    """The files that a build reads, and folders that it must leave out."""

    def fill(folder: Path) -> None:
        leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
        for name in (*PACKAGES, "tests/meta", "benchmarks", "scripts"):
            shutil.copytree(ROOT / name, folder / name, ignore=leave)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)

    return made_once("sources", fill)


@pytest.fixture(scope="session")
def wheel(sources, made_once) -> Path:
    """The wheel that ``pip wheel`` builds from the sources with this environment's setuptools."""

    def fill(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "wheel", str(sources), "--wheel-dir", str(folder)]
        done = subprocess.run(
            [*command, "--no-deps", "--no-build-isolation", "--quiet"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    (made,) = made_once("wheel", fill).iterdir()
    return made
