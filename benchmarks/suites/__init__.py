"""What is measured. A suite is data: its cases by size, and a function from a case to rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.peers import Peer
from benchmarks.result_rows import Row
from benchmarks.timing import Effort

#: Of every suite: "ci" for tests, "cpu" and "gpu" for results that are kept.
SIZES = ("ci", "cpu", "gpu")


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure.

    Attributes:
        peers: who takes part, this library included.
        effort: rounds of each case.
    """

    device: torch.device
    peers: Sequence[Peer]
    effort: Effort = field(default_factory=Effort)


@dataclass(frozen=True, slots=True)
class Suite:
    """One suite.

    Attributes:
        says: one line of ``python -m benchmarks list``.
        cases: size -> its cases, which have a readable ``str``.
        run: the rows of a case, as they come.
        warm: compiles what a case needs and keeps it on disk; None where nothing is compiled.
    """

    name: str
    says: str
    cases: Callable[[str], Sequence[Any]]
    run: Callable[[Any, Options], Iterator[Row]]
    warm: Callable[[Any, Options], None] | None = None


def row(suite: str, case: Any, metric: str, unit: str, peer: Peer, options: Options) -> Row:
    """A row without a number yet."""
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
    """All of them by name, in the order they run."""
    from benchmarks.suites import generate, load, memory, models, op, orthonormal, serve

    found = (
        op.SUITE,
        orthonormal.SUITE,
        models.LAYER,
        models.STEP,
        memory.SUITE,
        generate.SUITE,
        load.SUITE,
        serve.SUITE,
    )
    return {suite.name: suite for suite in found}
