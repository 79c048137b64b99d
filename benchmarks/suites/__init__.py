"""Suites: the cases of each size, and a function that measures a case and yields rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.peers import Peer
from benchmarks.result_rows import Row
from benchmarks.timing import Effort

#: Sizes of every suite: "ci" for tests, "cpu" and "gpu" for committed results.
SIZES = ("ci", "cpu", "gpu")


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of a measurement.

    Attributes:
        peers: the participants, this library included.
        effort: the number of rounds per case.
    """

    device: torch.device
    peers: Sequence[Peer]
    effort: Effort = field(default_factory=Effort)


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite.

    Attributes:
        title: a line of ``python -m benchmarks list``.
        cases: maps a size to its cases, which have a readable ``str``.
        run: measures a case and yields its rows.
        warm: compiles the builds of a case into the cache on disk; None if there are none.
    """

    name: str
    title: str
    cases: Callable[[str], Sequence[Any]]
    run: Callable[[Any, Options], Iterator[Row]]
    warm: Callable[[Any, Options], None] | None = None


def blank_row(suite: str, case: Any, metric: str, unit: str, peer: Peer, options: Options) -> Row:
    """A row without a number."""
    return Row(
        suite=suite,
        case=str(case),
        metric=metric,
        shape=case.shape,
        peer=peer.name,
        version=peer.version,
        unit=unit,
        value=None,
        machine=describe(options.device),
        note=peer.note,
    )


def suites() -> dict[str, Suite]:
    """All suites by name, in order of execution."""
    from benchmarks.suites import generate, load, memory, models, op, orthonormal, serve

    ordered = (
        op.SUITE,
        orthonormal.SUITE,
        models.LAYER,
        models.STEP,
        memory.SUITE,
        generate.SUITE,
        load.SUITE,
        serve.SUITE,
    )
    return {suite.name: suite for suite in ordered}


def first_line(error: BaseException) -> str:
    """The message of an error in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
