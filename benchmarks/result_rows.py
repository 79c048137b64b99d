"""Result rows: one JSON object per line, one file per suite, one folder per device."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.timing import Quantiles, paired_ratio, quantiles

RESULTS = Path(__file__).resolve().parent / "results"
FORMAT = 1


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True)
class Gate:
    """The check before a measurement.

    Attributes:
        passed: whether it passed; if not, the row has no number.
        says: the errors beside the tolerance, or the failure.
    """

    passed: bool
    says: str


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity of one peer in one case.

    Attributes:
        suite, case, metric: the quantity; ``case`` is a readable id.
        shape: the fields of the case.
        peer, version: the peer and its version.
        unit: "s", "bytes", "count" or "" for a bare number.
        value, p20, p80, rounds: quantiles over the rounds; None if there is no number.
        ratio, ratio_p20, ratio_p80: quantiles of the rounds' ratios to ``baseline``.
        baseline: the peer that ratios refer to.
        bytes, flops: the least that the work needs, not what the peer does.
        bandwidth: bytes per second of a copy on this device, in this run.
        gate: the check of exactly this shape; None if the suite compares no numbers.
        absent: the reason why there is no number.
        machine: device, driver, versions, commit.
        note: a remark on the peer for the reader.
        when: the time of the measurement, UTC.
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
        """The identity of the quantity, independent of time and machine."""
        return self.suite, self.case, self.metric, self.peer

    @property
    def share(self) -> float | None:
        """Needed bytes ÷ time ÷ bandwidth of a copy; None if one of them is unknown."""
        if self.unit != "s" or not self.value or not self.bytes or not self.bandwidth:
            return None
        return self.bytes / self.value / self.bandwidth

    def timed(self, seconds: Quantiles, ratio: Quantiles | None = None) -> Row:
        """A copy of this row with numbers."""
        changed: dict[str, Any] = {
            "value": seconds.median,
            "p20": seconds.p20,
            "p80": seconds.p80,
            "rounds": seconds.rounds,
        }
        if ratio is not None:
            changed |= {
                "ratio": ratio.median,
                "ratio_p20": ratio.p20,
                "ratio_p80": ratio.p80,
            }
        return dataclasses.replace(self, **changed)

    def with_rounds(self, seconds: Sequence[float], baseline: Sequence[float] | None) -> Row:
        """A copy with the quantiles of all rounds, and of their ratios to the baseline's rounds."""
        ratio = None if baseline is None else paired_ratio(seconds, baseline)
        return self.timed(quantiles(seconds), ratio)

    def as_json(self) -> str:
        """The row as a line of JSON."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


def parse(line: str) -> Row:
    """Read a row from its JSON.

    Raises:
        ValueError: the line is not a row of :data:`FORMAT`.
    """
    fields = json.loads(line)
    known = {field.name for field in dataclasses.fields(Row)}
    version = fields.get("format") if isinstance(fields, dict) else None
    if version != FORMAT or fields.keys() - known:
        raise ValueError(f"not a result of format {FORMAT}, got {version!r}: {line[:120]}")
    if fields.get("gate") is not None:
        fields["gate"] = Gate(**fields["gate"])
    return Row(**fields)


def read(path: Path) -> list[Row]:
    """Read the rows of a file, or of all files below a folder, in order of names.

    If a file holds several rows of a quantity, the last one counts.

    Raises:
        FileNotFoundError: ``path`` does not exist or holds no results.
        ValueError: a line is not a row; the message names file and line.
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
            key = (str(file.parent), *row.key)
            latest.pop(key, None)
            latest[key] = row
    return list(latest.values())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old or the new content, even after a crash."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.write_bytes(content)
    scratch.replace(path)


class Writer:
    """Writes rows one by one; a run replaces the earlier rows of its suites."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: set[str] = set()

    def write(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Write each row and yield it."""
        for row in rows:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{row.suite}.jsonl"
            mode = "a" if row.suite in self._started else "w"
            self._started.add(row.suite)
            with path.open(mode, encoding="utf-8") as file:
                file.write(row.as_json() + "\n")
            yield row
