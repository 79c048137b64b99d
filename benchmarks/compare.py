"""The command ``python -m benchmarks compare``: changes between two results, beside their noise."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.report.number_format import NONE, percent, quantity, times
from benchmarks.report.tables import by_key
from benchmarks.result_rows import Row, read
from benchmarks.run import stop

_CONDITIONS = (
    "device", "kind", "driver", "threads", "platform", "python", "torch", "triton", "transformers"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """A quantity in both results; a smaller value is always better."""

    before: Row
    after: Row

    @property
    def ratio(self) -> float:
        """after ÷ before; ±∞ if ``before`` is zero or negative."""
        old, new = self.before.value or 0.0, self.after.value or 0.0
        if old == new:
            return 1.0
        return new / old if old > 0 else math.copysign(math.inf, new - old)

    @property
    def clear(self) -> bool:
        """Whether the ranges from p20 to p80 do not overlap."""
        (low, high), (new_low, new_high) = map(_range, (self.before, self.after))
        return new_low > high or new_high < low

    @property
    def verdict(self) -> str:
        """For times "slower" or "faster", else "more" or "less"; empty within the noise."""
        if not self.clear:
            return ""
        words = ("slower", "faster") if self.after.unit == "s" else ("more", "less")
        return words[self.ratio < 1]

    def worse(self, threshold: float) -> bool:
        """Whether this library exceeds ``threshold``, beyond the noise."""
        return of_this_library(self.after) and self.clear and self.ratio > threshold


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two results of the same suites.

    Attributes:
        changes: quantities with a number in both results.
        lost: (before, after) rows of which only the first has a number.
        gained: (before, after) rows of which only the second has a number.
        only_before, only_after: rows without a counterpart.
    """

    changes: Sequence[Change]
    lost: Sequence[tuple[Row, Row]]
    gained: Sequence[tuple[Row, Row]]
    only_before: Sequence[Row]
    only_after: Sequence[Row]

    def regressions(self, threshold: float) -> list[str]:
        """A line for each quantity of this library that is worse, or that lost its number."""
        worse = [
            f"{_name(change.after)} {_times(change.ratio)}"
            for change in self.changes
            if change.worse(threshold)
        ]
        return worse + [
            f"{_name(after)} has no number any more: {after.absent}"
            for _, after in self.lost
            if of_this_library(after)
        ]


def of_this_library(row: Row) -> bool:
    """Whether a row measures this library."""
    return row.peer.startswith("ours")


def compare_rows(before: Iterable[Row], after: Iterable[Row]) -> Comparison:
    """Match rows by their keys.

    Raises:
        ValueError: a result has two rows with the same key.
    """
    old, new = by_key(before), by_key(after)
    pairs = [(row, new[key]) for key, row in old.items() if key in new]
    return Comparison(
        [Change(a, b) for a, b in pairs if a.value is not None and b.value is not None],
        [(a, b) for a, b in pairs if a.value is not None and b.value is None],
        [(a, b) for a, b in pairs if a.value is None and b.value is not None],
        [row for key, row in old.items() if key not in new],
        [row for key, row in new.items() if key not in old],
    )


def warnings(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """A line for each difference between machines and peer versions; commits may differ."""
    lines = []
    for name in _CONDITIONS:
        old, new = ({str(row.machine.get(name)) for row in rows} for rows in (before, after))
        if old != new:
            lines.append(f"{name}: {_listed(old)} before, {_listed(new)} after")
    old_peers, new_peers = _versions(before), _versions(after)
    for peer in old_peers:
        if peer in new_peers and old_peers[peer] != new_peers[peer]:
            old, new = old_peers[peer], new_peers[peer]
            lines.append(f"{peer}: {_listed(old)} before, {_listed(new)} after")
    return lines


def compare_results(
    before: Annotated[Path, typer.Argument(help="A .jsonl file, or the folder of a device.")],
    after: Annotated[Path, typer.Argument(help="Results of the same suites, measured later.")],
    threshold: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            help="Exit 1 if a quantity of this library grew beyond this factor and its noise: "
            "1.05 allows 5 %.",
        ),
    ] = None,
) -> None:
    """Compare two results, a table per metric, the largest increase first."""
    try:
        sides = read(before), read(after)
        comparison = compare_rows(*sides)
    except (OSError, ValueError) as error:
        stop(str(error), 2)
    for line in warnings(*sides):
        typer.echo(f"warning: {line}", err=True)
    console = Console()
    # Without a terminal rich would cut the table to 80 columns.
    console = console if console.is_terminal else Console(width=160)
    for table in _tables(comparison.changes):
        console.print(table)
    for line in _summary(comparison):
        console.print(line, highlight=False, markup=False)
    if threshold is None:
        return
    if not any(of_this_library(change.after) for change in comparison.changes):
        stop("--threshold: no number of this library is in both results", 2)
    if worse := comparison.regressions(threshold):
        stop(f"{len(worse)} of this library's numbers are worse: {'; '.join(worse)}", 1)


def _tables(changes: Sequence[Change]) -> Iterable[Table]:
    groups: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        groups.setdefault((change.after.suite, change.after.metric), []).append(change)
    for (suite, metric), group in groups.items():
        table = Table(title=f"{suite}: {metric}", title_justify="left")
        for head in ("case", "peer"):
            table.add_column(head)
        for head in ("before", "after", "after/before", "beyond noise"):
            table.add_column(head, justify="right")
        for change in sorted(group, key=lambda change: -change.ratio):
            table.add_row(
                change.after.case,
                change.after.peer,
                *(quantity(row.value or 0.0, row.unit) for row in (change.before, change.after)),
                _times(change.ratio),
                change.verdict,
            )
        yield table


def _summary(comparison: Comparison) -> Iterable[str]:
    changes = comparison.changes
    clear = [change for change in changes if change.clear]
    more = sum(change.ratio > 1 for change in clear)
    yield (
        f"{len(changes)} in both results: {more} more, {len(clear) - more} less, "
        f"{len(changes) - len(clear)} within the noise"
    )
    others = [
        change.ratio
        for change in changes
        if not of_this_library(change.after) and change.after.unit == "s"
    ]
    if others:
        drift = percent(statistics.median(others))
        yield f"times of other peers, whose code did not change: median {drift}"
    for rows, side in ((comparison.only_before, "before"), (comparison.only_after, "after")):
        if rows:
            suites = Counter(row.suite for row in rows)
            listed = ", ".join(f"{suite} {count}" for suite, count in suites.items())
            yield f"{len(rows)} only {side}: {listed}"
    for _, row in comparison.lost:
        yield f"no number any more: {_name(row)}: {row.absent}"
    if comparison.gained:
        yield f"{len(comparison.gained)} have a number only after"


def _range(row: Row) -> tuple[float, float]:
    value = row.value or 0.0
    return (
        value if row.p20 is None else row.p20,
        value if row.p80 is None else row.p80,
    )


def _times(ratio: float) -> str:
    if math.isinf(ratio):
        return "from zero" if ratio > 0 else "below zero"
    return times(ratio) if ratio > 0 else NONE


def _name(row: Row) -> str:
    return f"{row.suite} {row.case} {row.metric} {row.peer}"


def _versions(rows: Iterable[Row]) -> Mapping[str, set[str]]:
    versions: dict[str, set[str]] = {}
    for row in rows:
        if row.version is not None:
            versions.setdefault(row.peer.split(",")[0], set()).add(row.version)
    return versions


def _listed(values: Iterable[str]) -> str:
    return " and ".join(sorted(values))
