"""Results of a demo: tables, JSON, and a check of the goals."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from reft.demo.measure import StepTimes
from reft.io.atomic_write import write_whole


class GoalsMissed(RuntimeError):
    """A demo finished, but its results miss the goals."""


@dataclass(frozen=True, slots=True)
class Goals:
    """Goals for the share of right answers: at most ``before`` training, at least ``after``."""

    before: float = 0.20
    after: float = 0.90


@dataclass(frozen=True, slots=True)
class Sample:
    """A held-out prompt, the expected answer, and the answers before and after training."""

    prompt: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class DemoReport:
    """Results of a run.

    Attributes:
        title: title of the demo.
        metric: the metric of ``before`` and ``after``, such as "exact match".
        before, after: share of right held-out answers, in [0, 1].
        heldout: number of held-out examples.
        examples: number of training examples.
        steps: optimizer steps.
        seed: seed of all random numbers.
        train_seconds: duration of training.
        trained, total: numbers of trainable and of all parameters.
        times: time of a training step and of the baseline step.
        orthonormality_error: max |R Rᵀ − I| after training.
        adapter, adapter_bytes: folder of the adapter, and the size of its files.
        reloaded_same, reloaded: number of equal answers in a fresh process, and of all answers.
        loss_curve: the PNG.
        seconds: duration of the run.
        samples: examples of answers.
    """

    title: str
    metric: str
    before: float
    after: float
    heldout: int
    examples: int
    steps: int
    seed: int
    train_seconds: float
    trained: int
    total: int
    times: StepTimes
    orthonormality_error: float
    adapter: str
    adapter_bytes: int
    reloaded_same: int
    reloaded: int
    loss_curve: str
    seconds: float
    samples: tuple[Sample, ...]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the results as JSON, replacing the file atomically."""
        write_whole(path, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    def show(self, console: Console) -> None:
        """Print the samples and the results."""
        samples = Table(title="Held-out examples", title_justify="left")
        samples.add_column("prompt", overflow="fold", ratio=3)
        for name in ("before", "after", "expected"):
            samples.add_column(name, overflow="fold", ratio=2)
        for sample in self.samples:
            cells = (sample.prompt, sample.before, sample.after, sample.expected)
            samples.add_row(*(Text(cell.strip()) for cell in cells))  # Text: no markup in answers
        console.print(samples)
        results = Table(title=self.title, title_justify="left", show_header=False)
        results.add_column(style="bold", no_wrap=True)
        results.add_column(overflow="fold")
        for name, value in self._rows():
            results.add_row(name, Text(value))
        console.print(results)

    def _rows(self) -> list[tuple[str, str]]:
        times = self.times
        of_heldout = f"of {self.heldout} held-out examples"
        training = f"{self.examples} examples, {self.steps} steps, {self.train_seconds:.0f} s"
        baseline = f"baseline {times.floor_ms:.1f} ms: {times.ratio:.2f} times"
        return [
            (f"{self.metric} before", f"{self.before:.1%} {of_heldout}"),
            (f"{self.metric} after", f"{self.after:.1%} {of_heldout}"),
            ("training", f"{training}, seed {self.seed}"),
            (
                "trainable parameters",
                f"{self.trained:,} of {self.total:,} ({self.trained / self.total:.2%})",
            ),
            ("a training step", f"{times.step_ms:.1f} ms; {baseline} (median of {times.rounds})"),
            ("max |R Rᵀ − I|", f"{self.orthonormality_error:.1e}"),
            ("adapter", f"{self.adapter} ({self.adapter_bytes / 1e3:.1f} kB)"),
            ("in a fresh process", f"{self.reloaded_same} of {self.reloaded} answers the same"),
            ("loss curve", self.loss_curve),
            ("the whole demo", f"{self.seconds:.0f} s"),
        ]

    def require(self, goals: Goals) -> None:
        """Check the results against goals.

        Raises:
            GoalsMissed: results miss a goal; the message names them.
        """
        missed = []
        if self.before > goals.before:
            allowed = f"at most {goals.before:.0%}"
            missed.append(f"{self.metric} before training is {self.before:.1%}, not {allowed}")
        if self.after < goals.after:
            allowed = f"at least {goals.after:.0%}"
            missed.append(f"{self.metric} after training is {self.after:.1%}, not {allowed}")
        if self.reloaded_same != self.reloaded:
            missed.append(
                f"{self.reloaded - self.reloaded_same} of {self.reloaded} answers changed when the "
                "adapter was reloaded in a fresh process"
            )
        if missed:
            raise GoalsMissed("; ".join(missed))


def count_same(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Count equal answers in two lists.

    Raises:
        ValueError: the lists have different lengths.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"both lists must have the same length, got {len(ours)} and {len(theirs)}")
    return sum(a == b for a, b in zip(ours, theirs, strict=True))


def folder_bytes(folder: Path) -> int:
    """Return the size of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
