"""Results of runs: one JSON Lines file per task, one line per run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.methods import METHODS
from benchmarks.result_rows import replace_file

FORMAT = 1
#: The seed of the runs that choose the learning rate.
FIRST_SEED = 0

#: The plan, scores, parameter counts, time and machine of one run, as JSON has them.
Result = dict[str, Any]


def results_file(folder: Path, task: str) -> Path:
    """The file of a task's results."""
    return folder / f"{task}.jsonl"


def read_results(file: Path) -> list[Result]:
    """Read the results of a task; a file that does not exist has none.

    Raises:
        ValueError: a line is not JSON or has another format; the message names file and line.
    """
    if not file.exists():
        return []
    results = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            result = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
        given = result.get("format") if isinstance(result, dict) else None
        if given != FORMAT:
            raise ValueError(f"{file}, line {number}: format must be {FORMAT}, got {given!r}")
        results.append(result)
    return results


def run_key(plan: Mapping[str, Any]) -> tuple[str, float, int]:
    """Method, learning rate and seed of a plan: they identify a run within its task."""
    return plan["method"], plan["rate"], plan["seed"]


def store_result(file: Path, result: Result) -> None:
    """Add a result to the file of its task, in place of an older result of the same run.

    Lines stay sorted by :func:`run_key`.
    """
    results = {run_key(stored["plan"]): stored for stored in read_results(file)}
    results[run_key(result["plan"])] = result
    lines = [json.dumps(results[key]) + "\n" for key in sorted(results)]
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, "".join(lines).encode())


def best_rate(results: Mapping[float, Mapping[str, Any]]) -> float:
    """Choose the learning rate with the best final score on the development part.

    Ties go to the rate with the higher mean over all points, which learnt sooner, and then to the
    smaller rate. Neither the held-out part nor the training loss is considered.
    """

    def merit(rate: float) -> tuple[float, float, float]:
        scores = results[rate]["development"]
        return scores[-1], statistics.fmean(scores), -rate

    return max(results, key=merit)


@dataclass(frozen=True)
class MethodResults:
    """The results of one method on one task.

    Attributes:
        method: the name of the method.
        rate: the learning rate that was chosen.
        runs: the results at that rate, by seed.
        tried: maps every learning rate to its result with the first seed.
    """

    method: str
    rate: float
    runs: tuple[Result, ...]
    tried: Mapping[float, Result]

    @property
    def finals(self) -> list[float]:
        """Held-out scores at the end of training, in percent."""
        return [100 * run["heldout"][-1] for run in self.runs]

    @property
    def curve(self) -> list[tuple[int, float, float]]:
        """(step, mean, standard deviation) of the held-out score in percent."""
        points = []
        for index, step in enumerate(self.runs[0]["plan"]["points"]):
            scores = [100 * run["heldout"][index] for run in self.runs]
            points.append((step, statistics.fmean(scores), standard_deviation(scores)))
        return points

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return int(self.runs[0]["trained"])


def method_results(folder: Path, task: str) -> list[MethodResults]:
    """Read the results of every method on a task, in the order of :data:`METHODS`.

    Raises:
        FileNotFoundError: there are no results of the task.
        ValueError: a line is not a result of this format.
    """
    file = results_file(folder, task)
    results = read_results(file)
    if not results:
        raise FileNotFoundError(f"no results in {file}; run `python -m benchmarks learn`")
    methods = []
    for method in METHODS:
        runs = [result for result in results if result["plan"]["method"] == method]
        tried = {run["plan"]["rate"]: run for run in runs if run["plan"]["seed"] == FIRST_SEED}
        if not tried:
            continue
        rate = best_rate(tried)
        best = [run for run in runs if run["plan"]["rate"] == rate]
        best.sort(key=lambda run: run["plan"]["seed"])
        methods.append(MethodResults(method, rate, tuple(best), dict(sorted(tried.items()))))
    return methods


def standard_deviation(values: list[float]) -> float:
    """The sample standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
