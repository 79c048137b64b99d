"""docs/learning.md: its tables and its plot, from the committed files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.learning import tables
from benchmarks.learning.tables import Learnt
from benchmarks.learning.tasks import TASKS
from benchmarks.machine import ROOT
from benchmarks.report.plots.learning import plot

PAGE = ROOT / "docs" / "learning.md"
PLOT = "learning.png"


def parts(folder: Path) -> dict[str, list[str]]:
    """Marker -> the lines between it and its end."""
    found = {task: tables.read(folder, task) for task in TASKS if (folder / task).is_dir()}
    lines = {
        f"scores of {task}": [tables.about(task, one), "", *tables.scores(task, one)]
        for task, one in found.items()
    }
    tried = {f"rates of {task}": tables.rates(one) for task, one in found.items()}
    return {**lines, **tried, "family": tables.family(dict(found))}


def filled(text: str, lines: Mapping[str, Sequence[str]]) -> str:
    """A page with the lines between its markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    for marker, new in lines.items():
        begin, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the page must hold {begin} and {end} once each")
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = "\n".join([f"{head}{begin}", *new, f"{end}{tail}"])
    return text


def write_page(folder: Path) -> Path:
    """Bring the tables of the page and its plot up to date."""
    text = filled(PAGE.read_text(encoding="utf-8"), parts(folder))
    beside = PAGE.with_name(f".{PAGE.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(PAGE)
    found: dict[str, Sequence[Learnt]] = {
        task: tables.read(folder, task) for task in TASKS if (folder / task).is_dir()
    }
    plot(found, PAGE.parent / PLOT)
    return PAGE
