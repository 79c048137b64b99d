"""What a demo found out: as a table, as JSON, and whether it is what was promised."""

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
    """A demo ran to its end, but its figures are not the promised ones."""


@dataclass(frozen=True, slots=True)
class Goals:
    """Shares of right answers: ``before`` is the most without the adapter, ``after`` the least."""

    before: float = 0.20
    after: float = 0.90


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out prompt, what is wanted, and what came before and after training."""

    prompt: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class DemoReport:
    """All figures of one run.

    Attributes:
        title: what was shown.
        metric: what ``before`` and ``after`` count, for instance "exact match".
        before, after: the share of held-out answers that are right, in [0, 1].
        heldout: how many held-out examples there are.
        examples: how many the adapter was trained on.
        steps: optimizer steps; ``seed`` was the source of all randomness.
        train_seconds: what they took.
        trained, total: parameters.
        times: a training step against the frozen model's own.
        orthonormality_error: max |R Rᵀ − I| after training.
        adapter, adapter_bytes: the folder, and the size of its files.
        reloaded_same, reloaded: how many answers of a fresh process are the same, of how many.
        loss_curve: the PNG.
        seconds: the whole run.
        samples: a few answers.
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
        """Write the figures as JSON, replacing the file in one step."""
        write_whole(path, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    def show(self, console: Console) -> None:
        """Print the samples and the figures."""
        samples = Table(title="Held-out examples", title_justify="left")
        samples.add_column("prompt", overflow="fold", ratio=3)
        for name in ("before", "after", "wanted"):
            samples.add_column(name, overflow="fold", ratio=2)
        for one in self.samples:
            cells = (one.prompt, one.before, one.after, one.expected)
            samples.add_row(*(Text(cell.strip()) for cell in cells))  # Text: no markup in answers
        console.print(samples)
        figures = Table(title=self.title, title_justify="left", show_header=False)
        figures.add_column(style="bold", no_wrap=True)
        figures.add_column(overflow="fold")
        for name, value in self._rows():
            figures.add_row(name, Text(value))
        console.print(figures)

    def _rows(self) -> list[tuple[str, str]]:
        times = self.times
        asked = f"of {self.heldout} held-out examples"
        training = f"{self.examples} examples, {self.steps} steps, {self.train_seconds:.0f} s"
        floor = f"the frozen model's own {times.floor_ms:.1f} ms: {times.ratio:.2f} times"
        return [
            (f"{self.metric} before", f"{self.before:.1%} {asked}"),
            (f"{self.metric} after", f"{self.after:.1%} {asked}"),
            ("training", f"{training}, seed {self.seed}"),
            (
                "trained parameters",
                f"{self.trained:,} of {self.total:,} ({self.trained / self.total:.2%})",
            ),
            ("a training step", f"{times.step_ms:.1f} ms; {floor} (median of {times.rounds})"),
            ("max |R Rᵀ − I|", f"{self.orthonormality_error:.1e}"),
            ("adapter", f"{self.adapter} ({self.adapter_bytes / 1e3:.1f} kB)"),
            ("in a fresh process", f"{self.reloaded_same} of {self.reloaded} answers the same"),
            ("loss curve", self.loss_curve),
            ("the whole demo", f"{self.seconds:.0f} s"),
        ]

    def require(self, goals: Goals) -> None:
        """Hold the figures against what was promised.

        Raises:
            GoalsMissed: naming each figure that is not as promised.
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
    """How many answers agree, one by one.

    Raises:
        ValueError: not as many answers.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"there must be as many answers, got {len(ours)} and {len(theirs)}")
    return sum(a == b for a, b in zip(ours, theirs, strict=True))


def folder_bytes(folder: Path) -> int:
    """The size of a folder's files."""
    return sum(one.stat().st_size for one in folder.iterdir() if one.is_file())
