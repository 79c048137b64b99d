"""What came out, as tables: from the files alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.methods import FAMILY, METHODS
from benchmarks.learning.run import FIRST_SEED, best_rate
from benchmarks.learning.tasks import TASKS


@dataclass(frozen=True)
class Learnt:
    """One method on one task, with the rate that was chosen.

    Attributes:
        method: its name.
        rate: the learning rate.
        runs: results with that rate, by seed.
        tried: rate -> the result with the first seed.
    """

    method: str
    rate: float
    runs: tuple[dict[str, Any], ...]
    tried: Mapping[float, dict[str, Any]]

    @property
    def finals(self) -> list[float]:
        """Held-out scores at the end, in percent."""
        return [100 * run["heldout"][-1] for run in self.runs]

    @property
    def curve(self) -> list[tuple[int, float, float]]:
        """(step, mean, standard deviation) of the held-out score in percent."""
        rows = []
        for at, step in enumerate(self.runs[0]["plan"]["points"]):
            values = [100 * run["heldout"][at] for run in self.runs]
            rows.append((step, statistics.fmean(values), _sd(values)))
        return rows

    @property
    def trained(self) -> int:
        """Parameters that were trained."""
        return int(self.runs[0]["trained"])


def read(folder: Path, task: str) -> list[Learnt]:
    """Every method of a task, in the order of :data:`METHODS`.

    Raises:
        FileNotFoundError: no result of the task.
    """
    found = [json.loads(path.read_text("utf-8")) for path in sorted((folder / task).glob("*.json"))]
    if not found:
        raise FileNotFoundError(f"no results in {folder / task}: python -m benchmarks learn")
    learnt = []
    for method in METHODS:
        mine = [one for one in found if one["plan"]["method"] == method]
        tried = {one["plan"]["rate"]: one for one in mine if one["plan"]["seed"] == FIRST_SEED}
        if not tried:
            continue
        rate = best_rate(tried)
        runs = [one for one in mine if one["plan"]["rate"] == rate]
        runs.sort(key=lambda one: one["plan"]["seed"])
        learnt.append(Learnt(method, rate, tuple(runs), dict(sorted(tried.items()))))
    return learnt


def scores(task: str, learnt: Sequence[Learnt]) -> list[str]:
    """Score and parameters of every method, the best first."""
    first = learnt[0].runs[0]
    points = first["plan"]["points"]
    early = points[1 : len(points) - 1 : 2]
    head = ["method", "trained", "% of base", "rate"]
    head += [f"step {step}" for step in early] + [f"step {points[-1]}", "SD"]
    rows = []
    for one in sorted(learnt, key=lambda one: -statistics.fmean(one.finals)):
        at = {step: mean for step, mean, _ in one.curve}
        rows.append(
            [
                METHODS[one.method].title,
                f"{one.trained:,}",
                f"{100 * one.trained / first['base']:.2f}",
                f"{one.rate:g}",
                *[f"{at[step]:.1f}" for step in early],
                f"**{statistics.fmean(one.finals):.1f}**",
                f"{_sd(one.finals):.1f}",
            ]
        )
    return _table(head, rows)


def family(tables: dict[str, Sequence[Learnt]]) -> list[str]:
    """The six members beside the paper's Table 17, with their places in each column."""
    columns = {
        task: {one.method: statistics.fmean(one.finals) for one in learnt}
        for task, learnt in tables.items()
    }
    middle = {
        f"{task}, step {_half(learnt)}": {one.method: _at(one, _half(learnt)) for one in learnt}
        for task, learnt in tables.items()
    }
    every = {**middle, **{f"{task}, end": values for task, values in columns.items()}}
    head = ["member", "edit", "paper, LLaMA-7B arithmetic", *every]
    rows = []
    for method, published in FAMILY.items():
        row = [METHODS[method].title, f"`{METHODS[method].equation}`"]
        row.append(f"{published:.1f} ({_place(FAMILY, method)})")
        for values in every.values():
            mine = {name: values[name] for name in FAMILY if name in values}
            row.append(f"{mine[method]:.1f} ({_place(mine, method)})" if method in mine else "")
        rows.append(row)
    return _table(head, rows)


def about(task: str, learnt: Sequence[Learnt]) -> str:
    """How the numbers of a task came about, in one sentence."""
    first = learnt[0].runs[0]
    plan, (training, development, _) = first["plan"], first["counts"]
    machine = first["machine"]
    return (
        f"{TASKS[task].title}: {TASKS[task].metric}; {training} records to learn from, "
        f"{development} on which the rates were chosen; {plan['steps']} steps of "
        f"{plan['batch_size']}; before training {100 * first['before']:.1f} %; mean and sample "
        f"standard deviation over {len(learnt[0].runs)} seeds; {first['base']:,} parameters; "
        f"{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"PEFT {machine['peft']}."
    )


def _half(learnt: Sequence[Learnt]) -> int:
    points = learnt[0].runs[0]["plan"]["points"]
    return int(points[len(points) // 2 - 1])


def _at(one: Learnt, step: int) -> float:
    return next(mean for at, mean, _ in one.curve if at == step)


def _place(values: Any, method: str) -> int:
    return 1 + sum(other > values[method] for other in values.values())


def _sd(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
