"""Bytes of a training step: the peak over the floor's, and what the adapter keeps for backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

from benchmarks.allocations import saved_bytes, traffic
from benchmarks.cases import LLAMA_1B, ModelCase, llama
from benchmarks.peers import Absent, peers
from benchmarks.result_rows import Row
from benchmarks.suites import Options, Suite, row
from benchmarks.suites.models import FLOOR, LLAMA_8B_STEP, Twins, check, make_batch, step


def cases(size: str) -> list[ModelCase]:
    if size == "ci":
        return [llama("Llama 64x2", 64, 2, 2, 32, vocabulary=64, positions="f3+l3", rank=4)]
    if size == "gpu":
        return [LLAMA_1B, LLAMA_8B_STEP]
    return [
        llama("Llama 1024x4", 1024, 4, 4, 128),
        llama("Llama 2048x2", 2048, 2, 4, 128),
    ]


def run(case: ModelCase, options: Options) -> Iterator[Row]:
    """Rows "peak" (forward, backward, AdamW) and "saved" (after a forward), less the floor's."""
    batch, twins = make_batch(case, options.device), Twins(case, options.device)
    gate = check(case, twins, batch)
    floor = next(peer for peer in peers() if peer.name == FLOOR)
    floors: dict[str, int] | None = None
    for peer in (floor, *(one for one in options.peers if one is not floor)):
        if peer.wrap is None or peer.name == "frozen again":
            continue
        blank = row("memory", case, "", "bytes", peer, options)
        if not gate.passed:
            absent = "the gate did not pass"
        else:
            try:
                wrapped = peer.wrap(twins.one(), case)
                once = step(wrapped, batch)
                once()
            except (Absent, RuntimeError) as error:
                absent = str(error).splitlines()[0][:300]
            else:
                absent = None
        if absent is not None:
            for metric in ("peak", "saved"):
                yield dataclasses.replace(blank, metric=metric, gate=gate, absent=absent)
            continue
        found = {
            "peak": traffic(once, options.device).peak,
            "saved": saved_bytes(partial(wrapped.loss, batch), wrapped.model),
        }
        if floors is None:
            floors = found
            continue
        for metric, size in found.items():
            yield dataclasses.replace(
                blank,
                metric=metric,
                value=size - floors[metric],
                baseline=FLOOR,
                gate=gate if wrapped.same_as_reference else None,
            )


SUITE = Suite("memory", "bytes of a training step over the frozen model's own", cases, run)
