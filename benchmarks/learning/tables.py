"""Markdown tables of the learning results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.learning.methods import FAMILY, METHODS
from benchmarks.learning.results import MethodResults, method_results, results_file
from benchmarks.learning.results import standard_deviation as deviation
from benchmarks.learning.tasks import TASKS
from benchmarks.report.tables import markdown


def read_tasks(folder: Path) -> dict[str, list[MethodResults]]:
    """The results of every task that has some."""
    return {
        task: method_results(folder, task) for task in TASKS if results_file(folder, task).exists()
    }


def page_sections(tasks: Mapping[str, Sequence[MethodResults]]) -> dict[str, str]:
    """Map each marker of docs/learning.md to the text of its section."""
    scores = {
        f"scores of {task}": f"{conditions(task, methods)}\n\n{score_table(methods)}"
        for task, methods in tasks.items()
    }
    rates = {f"rates of {task}": rate_table(methods) for task, methods in tasks.items()}
    return {**scores, **rates, "family": family_table(tasks)}


def untrained_score(methods: Sequence[MethodResults]) -> float:
    """Held-out score of the base models before training, in percent: the mean over the seeds."""
    return statistics.fmean(100 * run["before"] for run in methods[0].runs)


def score_table(methods: Sequence[MethodResults]) -> str:
    """Trainable parameters and scores of every method, best first, and of the base model."""
    first = methods[0].runs[0]
    points = first["plan"]["points"]
    head = ["method", "trained", "% of base", "rate"]
    head += [f"step {step}" for step in points] + ["SD"]
    lines = []
    for results in sorted(methods, key=lambda results: -statistics.fmean(results.finals)):
        means = [f"{mean:.1f}" for _, mean, _ in results.curve]
        lines.append(
            [
                METHODS[results.method].title,
                f"{results.trainable:,}",
                f"{100 * results.trainable / first['base']:.2f}",
                f"{results.rate:g}",
                *means[:-1],
                f"**{means[-1]}**",
                f"{deviation(results.finals):.1f}",
            ]
        )
    before = [100 * run["before"] for run in methods[0].runs]
    blank = [""] * (len(points) - 1)
    mean = f"**{untrained_score(methods):.1f}**"
    base = ["the base model, untrained", "0", "0.00", "", *blank, mean, f"{deviation(before):.1f}"]
    return markdown(head, [*lines, base])


def rate_table(methods: Sequence[MethodResults]) -> str:
    """Development and held-out score at each learning rate, first seed; the best rate is bold."""
    rates = sorted({rate for results in methods for rate in results.tried})
    lines = []
    for results in methods:
        line = [METHODS[results.method].title]
        for rate in rates:
            result = results.tried.get(rate)
            cell = ""
            if result is not None:
                development, heldout = (100 * result[part][-1] for part in _PARTS)
                cell = f"{development:.1f} / {heldout:.1f}"
                cell = f"**{cell}**" if rate == results.rate else cell
            line.append(cell)
        lines.append(line)
    return markdown(["method", *[f"{rate:g}" for rate in rates]], lines)


_PARTS = ("development", "heldout")


def family_table(tasks: Mapping[str, Sequence[MethodResults]]) -> str:
    """The six members beside the paper's Table 17, with the place of each in every column."""
    columns: dict[str, dict[str, float]] = {}
    for task, methods in tasks.items():
        step = _middle_step(methods)
        columns[f"{task}, step {step}"] = {
            results.method: _mean_at(results, step) for results in methods
        }
    for task, methods in tasks.items():
        columns[f"{task}, end"] = {
            results.method: statistics.fmean(results.finals) for results in methods
        }
    lines = []
    for method, published in FAMILY.items():
        line = [METHODS[method].title, f"`{METHODS[method].equation}`"]
        line.append(f"{published:.1f} ({_place(FAMILY, method)})")
        for scores in columns.values():
            members = {name: scores[name] for name in FAMILY if name in scores}
            line.append(
                f"{members[method]:.1f} ({_place(members, method)})" if method in members else ""
            )
        lines.append(line)
    return markdown(["member", "edit", "paper, LLaMA-7B arithmetic", *columns], lines)


def conditions(task: str, methods: Sequence[MethodResults]) -> str:
    """Data, training, machine and commit of a task's results, in one sentence."""
    first = methods[0].runs[0]
    plan, (training, development, _) = first["plan"], first["counts"]
    machine = first["machine"]
    runs = [run for results in methods for run in (*results.runs, *results.tried.values())]
    commits = sorted({run["machine"]["commit"] for run in runs})
    return (
        f"{TASKS[task].title}: {TASKS[task].metric}; {training} training records, "
        f"{development} development records that chose the rates; {plan['steps']} steps of "
        f"{plan['batch_size']}; mean and sample standard deviation over {len(methods[0].runs)} "
        f"seeds; {first['base']:,} parameters of the base; "
        f"{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"PEFT {machine['peft']}; commit {', '.join(commits)}."
    )


def _middle_step(methods: Sequence[MethodResults]) -> int:
    points = methods[0].runs[0]["plan"]["points"]
    return int(points[len(points) // 2 - 1])


def _mean_at(results: MethodResults, step: int) -> float:
    return next(mean for point, mean, _ in results.curve if point == step)


def _place(scores: Mapping[str, float], method: str) -> int:
    return 1 + sum(score > scores[method] for score in scores.values())
