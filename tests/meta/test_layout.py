"""Tests mirror the code: ``tests/reft/<folder>`` tests ``reft/<folder>``.

Tests of several folders together stand beside them: integration, distributed, crash_safety, …
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Tests of the whole package that stand beside the folders.
WHOLE_PACKAGE = {"test_absent.py"}


def _folders(parent: Path) -> set[str]:
    """Return the names of the folders with Python files, at any depth."""
    return {path.relative_to(parent).parts[0] for path in parent.glob("*/**/*.py")}


def test_every_folder_has_its_tests() -> None:
    assert _folders(ROOT / "tests" / "reft") == _folders(ROOT / "reft")
    for folder in _folders(ROOT / "reft"):
        assert [*(ROOT / "tests" / "reft" / folder).rglob("test_*.py")], folder


def test_tests_beside_the_folders_are_named_for_a_module() -> None:
    modules = {f"test_{path.name}" for path in (ROOT / "reft").glob("*.py")}
    tests = {path.name for path in (ROOT / "tests" / "reft").glob("test_*.py")}
    assert tests <= modules | WHOLE_PACKAGE


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports test files without their folders."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_no_file_or_folder_is_named_for_nothing() -> None:
    empty = {"util", "utils", "helper", "helpers", "common", "misc", "manager"}
    folders = ("reft", "reft_kernels", "benchmarks", "tests", "scripts", "docs")
    named = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if {Path(part).stem for part in path.relative_to(ROOT).parts} & empty
    ]
    assert not named
