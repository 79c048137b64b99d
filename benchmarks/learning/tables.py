"""What came out, as tables: from the files alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.methods import FAMILY, METHODS
from benchmarks.learning.run import FIRST_SEED, FORMAT, best_rate
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
        ValueError: a result of another format.
    """
    found = []
    for path in sorted((folder / task).glob("*.json")):
        found.append(json.loads(path.read_text("utf-8")))
        if found[-1].get("format") != FORMAT:
            raise ValueError(f"{path}: format must be {FORMAT}, got {found[-1].get('format')!r}")
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


def untrained(learnt: Sequence[Learnt]) -> float:
    """Held-out score of the base models before training, in percent: the mean over the seeds."""
    return statistics.fmean(100 * run["before"] for run in learnt[0].runs)


def scores(task: str, learnt: Sequence[Learnt]) -> list[str]:
    """Score and parameters of every method, the best first, and of the base model."""
    first = learnt[0].runs[0]
    points = first["plan"]["points"]
    head = ["method", "trained", "% of base", "rate"]
    head += [f"step {step}" for step in points] + ["SD"]
    rows = []
    for one in sorted(learnt, key=lambda one: -statistics.fmean(one.finals)):
        means = [f"{mean:.1f}" for _, mean, _ in one.curve]
        rows.append(
            [
                METHODS[one.method].title,
                f"{one.trained:,}",
                f"{100 * one.trained / first['base']:.2f}",
                f"{one.rate:g}",
                *means[:-1],
                f"**{means[-1]}**",
                f"{_sd(one.finals):.1f}",
            ]
        )
    before = [100 * run["before"] for run in learnt[0].runs]
    blank = [""] * (len(points) - 1)
    mean = f"**{untrained(learnt):.1f}**"
    rows.append(["the base model, untrained", "0", "0.00", "", *blank, mean, f"{_sd(before):.1f}"])
    return _table(head, rows)


def rates(learnt: Sequence[Learnt]) -> list[str]:
    """Each rate with the first seed: development / held-out score; the chosen one is bold."""
    every = sorted({rate for one in learnt for rate in one.tried})
    rows = []
    for one in learnt:
        row = [METHODS[one.method].title]
        for rate in every:
            found = one.tried.get(rate)
            cell = ""
            if found is not None:
                cell = f"{100 * found['development'][-1]:.1f} / {100 * found['heldout'][-1]:.1f}"
                cell = f"**{cell}**" if rate == one.rate else cell
            row.append(cell)
        rows.append(row)
    return _table(["method", *[f"{rate:g}" for rate in every]], rows)


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
    shown = [run for one in learnt for run in (*one.runs, *one.tried.values())]
    commits = sorted({run["machine"]["commit"] for run in shown})
    return (
        f"{TASKS[task].title}: {TASKS[task].metric}; {training} records to learn from, "
        f"{development} on which the rates were chosen; {plan['steps']} steps of "
        f"{plan['batch_size']}; mean and sample standard deviation over {len(learnt[0].runs)} "
        f"seeds; {first['base']:,} parameters of the base; "
        f"{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"PEFT {machine['peft']}; commit {', '.join(commits)}."
    )


def _half(learnt: Sequence[Learnt]) -> int:
    points = learnt[0].runs[0]["plan"]["points"]
    return int(points[len(points) // 2 - 1])


def _at(one: Learnt, step: int) -> float:
    return next(mean for at, mean, _ in one.curve if at == step)


def _place(values: Any, method: str) -> int:
    return 1 + sum(bool(other > values[method]) for other in values.values())


def _sd(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
