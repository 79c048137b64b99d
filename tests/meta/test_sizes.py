"""One reason to exist per file: short files, and no names that say nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 400
EMPTY_NAMES = {"util", "utils", "helper", "helpers", "common", "misc", "manager"}


def _files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [Path(line) for line in listed.splitlines() if (ROOT / line).is_file()]


def test_python_files_are_short() -> None:
    sizes = {
        str(path): len((ROOT / path).read_text().splitlines())
        for path in _files()
        if path.suffix == ".py"
    }
    assert sizes, "no files were found"
    assert not {name: size for name, size in sizes.items() if size > LIMIT}


def test_no_file_or_folder_is_named_for_nothing() -> None:
    named = [path for path in _files() if {Path(part).stem for part in path.parts} & EMPTY_NAMES]
    assert not named
