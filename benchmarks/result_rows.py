"""Rows of results: one JSON object a line, one file a suite, one folder a device."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.timing import Quantiles

RESULTS = Path(__file__).resolve().parent / "results"
FORMAT = 1


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True)
class Gate:
    """What was checked before anything was timed.

    Attributes:
        passed: without it there is no number.
        says: the errors and what was allowed, or what failed.
    """

    passed: bool
    says: str


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity of one peer in one case.

    Attributes:
        suite, case, metric: what was measured; ``case`` is its readable id.
        shape: the fields of the case.
        peer, version: who.
        unit: "s", "bytes", "count" or "" for a bare number.
        value, p20, p80, rounds: over the rounds; None where there is no number.
        ratio: median of the rounds' ratios to ``baseline``; ratio_p20 and ratio_p80 beside it.
        baseline: the peer that the ratio refers to.
        bytes, flops: what the work needs at least (not what the peer does).
        bandwidth: bytes a second of this device's own copy, in this run.
        gate: the check of exactly this shape; None where the suite compares no numbers.
        absent: why there is no number.
        machine: device, driver, versions, commit.
        note: what a reader must know of this peer.
        when: UTC.
    """

    suite: str
    case: str
    metric: str
    shape: dict[str, Any]
    peer: str
    version: str | None
    unit: str
    value: float | None
    p20: float | None = None
    p80: float | None = None
    rounds: int = 1
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    baseline: str | None = None
    bytes: int | None = None
    flops: int | None = None
    bandwidth: float | None = None
    gate: Gate | None = None
    absent: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    note: str | None = None
    when: str = field(default_factory=_now)
    format: int = FORMAT

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What names the quantity, whenever and wherever it was measured."""
        return self.suite, self.case, self.metric, self.peer

    @property
    def share(self) -> float | None:
        """Bytes the work needs ÷ time ÷ bandwidth of a copy."""
        if self.unit != "s" or not self.value or not self.bytes or not self.bandwidth:
            return None
        return self.bytes / self.value / self.bandwidth

    def timed(self, found: Quantiles, ratio: Quantiles | None = None) -> Row:
        """This row with numbers in it."""
        changed: dict[str, Any] = {
            "value": found.median,
            "p20": found.p20,
            "p80": found.p80,
            "rounds": found.rounds,
        }
        if ratio is not None:
            changed |= {
                "ratio": ratio.median,
                "ratio_p20": ratio.p20,
                "ratio_p80": ratio.p80,
            }
        return dataclasses.replace(self, **changed)

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


def parse(line: str) -> Row:
    """A row from its JSON.

    Raises:
        ValueError: it is not a row of a format this version reads.
    """
    given = json.loads(line)
    known = {one.name for one in dataclasses.fields(Row)}
    found = given.get("format") if isinstance(given, dict) else None
    if found != FORMAT or given.keys() - known:
        raise ValueError(f"not a result of format {FORMAT}, got {found!r}: {line[:120]}")
    if given.get("gate") is not None:
        given["gate"] = Gate(**given["gate"])
    return Row(**given)


def read(path: Path) -> list[Row]:
    """The rows of a file, or of all files of a folder and the folders in it, in order of names.

    Of a quantity that was measured several times the latest is taken.

    Raises:
        FileNotFoundError: there is nothing at ``path``, or no results in it.
        ValueError: a line is no row; the message names file and line.
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise FileNotFoundError(f"no results at {path}: a .jsonl file or a folder with some")
    latest: dict[tuple[Any, ...], Row] = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = parse(line)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
            place = (str(file.parent), *row.key)
            latest.pop(place, None)
            latest[place] = row
    return list(latest.values())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file at once: whoever reads it, or ends this process, finds the old or the new."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(content)
    beside.replace(path)


class Writer:
    """Writes rows as they come; a run replaces what the same suite wrote before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: set[str] = set()

    def write(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Write each row and hand it on."""
        for row in rows:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{row.suite}.jsonl"
            mode = "a" if row.suite in self._started else "w"
            self._started.add(row.suite)
            with path.open(mode, encoding="utf-8") as file:
                file.write(row.as_json() + "\n")
            yield row
