"""Finished runs of a folder, grouped by preset, model and data, with the published scores."""

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
    """A score over several runs: mean, sample standard deviation (None for a single run) and the
    published score, if any."""

    name: str
    mean: float
    sd: float | None
    published: float | None

    @property
    def difference(self) -> float | None:
        """The mean minus the published score."""
        return None if self.published is None else self.mean - self.published


@dataclass(frozen=True)
class Group:
    """Finished runs that differ only in their seeds.

    Attributes:
        key: a short hash of preset, model and data.
        preset: the preset with the changes of the user.
        model: the base model.
        runs: their ``result.json``, ordered by seed.
    """

    key: str
    preset: Preset
    model: str
    runs: tuple[dict[str, Any], ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the finished runs."""
        return tuple(run["seed"] for run in self.runs)

    @property
    def cells(self) -> list[Cell]:
        """Scores of the test sets and their average; empty if a judge must score."""
        scores = [run["scores"] for run in self.runs]
        cells = []
        for name in scores[0]:
            values = [score[name] for score in scores if score.get(name) is not None]
            if not values:
                continue
            sd = statistics.stdev(values) if len(values) > 1 else None
            cells.append(Cell(name, statistics.fmean(values), sd, self._published(name)))
        return cells

    @property
    def caveats(self) -> list[str]:
        """Differences from the paper's run."""
        preset = self.preset
        caveats = []
        if self.model != preset.hub_id:
            caveats.append(
                f"the model is {self.model}, the paper's {preset.model} ({preset.hub_id})"
            )
        changed = preset.changed()
        if changed:
            caveats.append(f"changed: {', '.join(changed)}")
        missing = [seed for seed in preset.train.seeds if seed not in self.seeds]
        if missing:
            caveats.append(f"seeds not run: {', '.join(map(str, missing))}")
        other = [seed for seed in self.seeds if seed not in preset.train.seeds]
        if other:
            caveats.append(f"seeds that are not the paper's: {', '.join(map(str, other))}")
        dtypes = sorted({run["dtype"] for run in self.runs} - {"bfloat16"})
        if dtypes:
            caveats.append(f"base model in {', '.join(dtypes)}, the paper's in bfloat16")
        return caveats

    def _published(self, name: str) -> float | None:
        published = self.preset.published
        return published.average if name == "average" else published.scores.get(name)


def collect(folder: str | os.PathLike[str]) -> tuple[list[Group], list[Path]]:
    """Return the groups of all finished runs below a folder, and the folders of unfinished runs.

    Raises:
        FileNotFoundError: the folder does not exist or has no run.
        ValueError: a file is not the result of a run.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder of runs: {root}")
    started = sorted(path.parent for path in root.rglob(RUN_FILE))
    if not started:
        raise FileNotFoundError(
            f"no run in {root}: `reft train --preset` writes {RUN_FILE} into the folder of each run"
        )
    unfinished = [path for path in started if not (path / RESULT_FILE).exists()]
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in started:
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
    """Yield seed, steps and training losses of each run."""
    for run in group.runs:
        rows = run["training"]["curve"]
        yield run["seed"], [row["step"] for row in rows], [row["loss"] for row in rows]
