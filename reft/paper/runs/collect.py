"""Runs that lie in a folder, grouped by what they ran, beside what was published of it."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft.paper.presets import Preset
from reft.paper.runs.result import RESULT_FILE, RUN_FILE, read_result, settings_of


@dataclass(frozen=True)
class Cell:
    """One number over several runs: its mean, its sample standard deviation (None of one run), and
    what the paper has, None where it has nothing."""

    name: str
    mean: float
    sd: float | None
    published: float | None

    @property
    def difference(self) -> float | None:
        """How far the mean lies above the paper's number."""
        return None if self.published is None else self.mean - self.published


@dataclass(frozen=True)
class Group:
    """Finished runs that differ in their seeds alone.

    Attributes:
        key: a short hash of preset, model and data, the same for all of them.
        preset: with what the user changed.
        model: the base model that was used.
        runs: what their ``result.json`` hold, by seed.
    """

    key: str
    preset: Preset
    model: str
    runs: tuple[dict[str, Any], ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the finished runs."""
        return tuple(run["seed"] for run in self.runs)

    @property
    def cells(self) -> list[Cell]:
        """Of each test set, then their average; nothing where only a judge can score."""
        found = [run["scores"] for run in self.runs]
        cells = []
        for name in found[0]:
            values = [one[name] for one in found if one.get(name) is not None]
            if not values:
                continue
            sd = statistics.stdev(values) if len(values) > 1 else None
            cells.append(Cell(name, statistics.fmean(values), sd, self._published(name)))
        return cells

    @property
    def caveats(self) -> list[str]:
        """Why these numbers are not those of the paper's own run: nothing if nothing differs."""
        preset = self.preset
        found = []
        if self.model != preset.hub_id:
            found.append(f"the model is {self.model}, the paper's {preset.model} ({preset.hub_id})")
        changed = preset.changed()
        if changed:
            found.append(f"changed: {', '.join(changed)}")
        missing = [seed for seed in preset.train.seeds if seed not in self.seeds]
        if missing:
            found.append(f"seeds not run: {', '.join(map(str, missing))}")
        other = [seed for seed in self.seeds if seed not in preset.train.seeds]
        if other:
            found.append(f"seeds that are not the paper's: {', '.join(map(str, other))}")
        dtypes = sorted({run["dtype"] for run in self.runs} - {"bfloat16"})
        if dtypes:
            found.append(f"base model in {', '.join(dtypes)}, the paper's in bfloat16")
        return found

    def _published(self, name: str) -> float | None:
        published = self.preset.published
        return published.average if name == "average" else published.scores.get(name)


def collect(folder: str | os.PathLike[str]) -> tuple[list[Group], list[Path]]:
    """(the groups of all finished runs below a folder, the folders of runs that are not finished).

    Raises:
        FileNotFoundError: no such folder, or no run in it.
        ValueError: a file that is not a run's.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder of runs: {root}")
    begun = sorted(path.parent for path in root.rglob(RUN_FILE))
    if not begun:
        raise FileNotFoundError(
            f"no run in {root}: `reft train --preset` leaves a {RUN_FILE} in the folder of each"
        )
    unfinished = [path for path in begun if not (path / RESULT_FILE).exists()]
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in begun:
        if path in unfinished:
            continue
        result = read_result(path / RESULT_FILE)
        key = json.dumps(settings_of(result), sort_keys=True)
        groups.setdefault(key, []).append(result)
    return [_group(key, runs) for key, runs in groups.items()], unfinished


def _group(key: str, runs: list[dict[str, Any]]) -> Group:
    ordered = tuple(sorted(runs, key=lambda run: run["seed"]))
    short = hashlib.sha256(key.encode()).hexdigest()[:8]
    return Group(short, Preset.from_dict(ordered[0]["preset"]), ordered[0]["model"], ordered)


def curves(group: Group) -> Iterator[tuple[int, list[int], list[float]]]:
    """(seed, steps, training losses) of each run."""
    for run in group.runs:
        rows = run["training"]["curve"]
        yield run["seed"], [row["step"] for row in rows], [row["loss"] for row in rows]
