"""``python -m benchmarks compare``: what changed between two runs, and whether that is noise."""

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

from benchmarks.report.tables import NONE, by_key, percent, quantity, times
from benchmarks.result_rows import Row, read
from benchmarks.run import stop

_CONDITIONS = (
    "device", "kind", "driver", "threads", "platform", "python", "torch", "triton", "transformers"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """One quantity on both sides; less is better for all that is measured here."""

    before: Row
    after: Row

    @property
    def ratio(self) -> float:
        """after ÷ before; infinite where something came out of nothing (or of less), −∞ where
        something went below it."""
        old, new = self.before.value or 0.0, self.after.value or 0.0
        if old == new:
            return 1.0
        return new / old if old > 0 else math.copysign(math.inf, new - old)

    @property
    def clear(self) -> bool:
        """Whether the ranges from p20 to p80 lie apart."""
        (low, high), (new_low, new_high) = map(_range, (self.before, self.after))
        return new_low > high or new_high < low

    @property
    def verdict(self) -> str:
        """ "slower" or "faster", of other than times "more" or "less"; nothing within the noise."""
        if not self.clear:
            return ""
        words = ("slower", "faster") if self.after.unit == "s" else ("more", "less")
        return words[self.ratio < 1]

    def worse(self, threshold: float) -> bool:
        """Whether this library lost more than ``threshold`` allows, beyond the noise."""
        return own(self.after) and self.clear and self.ratio > threshold


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two results of the same suites.

    Attributes:
        changes: what has a number on both sides.
        lost: rows (before, after) of which only the first has a number.
        gained: the same, only the second.
        only_before, only_after: rows without a counterpart.
    """

    changes: Sequence[Change]
    lost: Sequence[tuple[Row, Row]]
    gained: Sequence[tuple[Row, Row]]
    only_before: Sequence[Row]
    only_after: Sequence[Row]

    def regressions(self, threshold: float) -> list[str]:
        """A line for each quantity of this library that is worse, or has no number any more."""
        found = [
            f"{_name(one.after)} {_times(one.ratio)}"
            for one in self.changes
            if one.worse(threshold)
        ]
        return found + [
            f"{_name(after)} has no number any more: {after.absent}"
            for _, after in self.lost
            if own(after)
        ]


def own(row: Row) -> bool:
    """Whether a row is of this library."""
    return row.peer.startswith("ours")


def compare_rows(before: Iterable[Row], after: Iterable[Row]) -> Comparison:
    """Match rows by their keys.

    Raises:
        ValueError: a side has two rows of one key.
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
    """What differs between the conditions of the two sides, the commit aside."""
    found = []
    for name in _CONDITIONS:
        old, new = ({str(row.machine.get(name)) for row in rows} for rows in (before, after))
        if old != new:
            found.append(f"{name}: {_listed(old)} before, {_listed(new)} after")
    old_peers, new_peers = _versions(before), _versions(after)
    for peer in old_peers:
        if peer in new_peers and old_peers[peer] != new_peers[peer]:
            was, now = _listed(old_peers[peer]), _listed(new_peers[peer])
            found.append(f"{peer}: {was} before, {now} after")
    return found


def compare_results(
    before: Annotated[Path, typer.Argument(help="A .jsonl file, or the folder of a device.")],
    after: Annotated[Path, typer.Argument(help="The same, measured later.")],
    threshold: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            help="Exit 1 if anything of this library takes more than so many times what it took, "
            "outside its noise: 1.05 allows 5 %.",
        ),
    ] = None,
) -> None:
    """What changed between two results, metric by metric, the largest increase first."""
    try:
        sides = read(before), read(after)
        found = compare_rows(*sides)
    except (OSError, ValueError) as error:
        stop(str(error), 2)
    for line in warnings(*sides):
        typer.echo(f"warning: {line}", err=True)
    console = Console()
    # A pipe or a file has no width to fit: rich would cut the table to 80 columns.
    console = console if console.is_terminal else Console(width=160)
    for table in _tables(found.changes):
        console.print(table)
    for line in _summary(found):
        console.print(line, highlight=False, markup=False)
    if threshold is None:
        return
    if not any(own(one.after) for one in found.changes):
        stop("--threshold: no number of this library is on both sides", 2)
    if worse := found.regressions(threshold):
        stop(f"{len(worse)} of this library's numbers are worse: {'; '.join(worse)}", 1)


def _tables(changes: Sequence[Change]) -> Iterable[Table]:
    groups: dict[tuple[str, str], list[Change]] = {}
    for one in changes:
        groups.setdefault((one.after.suite, one.after.metric), []).append(one)
    for (suite, metric), group in groups.items():
        table = Table(title=f"{suite}: {metric}", title_justify="left")
        for head in ("case", "peer"):
            table.add_column(head)
        for head in ("before", "after", "after/before", "beyond noise"):
            table.add_column(head, justify="right")
        for one in sorted(group, key=lambda one: -one.ratio):
            table.add_row(
                one.after.case,
                one.after.peer,
                *(quantity(row.value or 0.0, row.unit) for row in (one.before, one.after)),
                _times(one.ratio),
                one.verdict,
            )
        yield table


def _summary(found: Comparison) -> Iterable[str]:
    clear = [one for one in found.changes if one.clear]
    more = sum(one.ratio > 1 for one in clear)
    yield (
        f"{len(found.changes)} on both sides: {more} more, {len(clear) - more} less, "
        f"{len(found.changes) - len(clear)} within the noise"
    )
    others = [one.ratio for one in found.changes if not own(one.after) and one.after.unit == "s"]
    if others:
        drift = percent(statistics.median(others))
        yield f"times of the other peers, which did not change with this code: median {drift}"
    for rows, where in ((found.only_before, "before"), (found.only_after, "after")):
        if rows:
            suites = Counter(row.suite for row in rows)
            listed = ", ".join(f"{suite} {count}" for suite, count in suites.items())
            yield f"{len(rows)} only {where}: {listed}"
    for _, row in found.lost:
        yield f"no number any more: {_name(row)}: {row.absent}"
    if found.gained:
        yield f"{len(found.gained)} have a number only after"


def _range(row: Row) -> tuple[float, float]:
    value = row.value or 0.0
    return (
        value if row.p20 is None else row.p20,
        value if row.p80 is None else row.p80,
    )


def _times(ratio: float) -> str:
    if math.isinf(ratio):
        return "from nothing" if ratio > 0 else "below nothing"
    return times(ratio) if ratio > 0 else NONE


def _name(row: Row) -> str:
    return f"{row.suite} {row.case} {row.metric} {row.peer}"


def _versions(rows: Iterable[Row]) -> Mapping[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in rows:
        if row.version is not None:
            found.setdefault(row.peer.split(",")[0], set()).add(row.version)
    return found


def _listed(values: Iterable[str]) -> str:
    return " and ".join(sorted(values))
