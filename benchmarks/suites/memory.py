"""Suite "memory": bytes that a training step adds to the frozen baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

from benchmarks.allocations import saved_bytes, traffic
from benchmarks.cases import LLAMA_1B, ModelCase, llama
from benchmarks.peers import Absent, peers
from benchmarks.result_rows import Row
from benchmarks.suites import Options, Suite, blank_row, first_line
from benchmarks.suites.models import (
    BASELINE,
    LLAMA_8B_STEP,
    Twins,
    check,
    make_batch,
    training_step,
)


def cases(size: str) -> list[ModelCase]:
    """Whole models of a size."""
    if size == "ci":
        return [llama("Llama 64x2", 64, 2, 2, 32, vocabulary=64, positions="f3+l3", rank=4)]
    if size == "gpu":
        return [LLAMA_1B, LLAMA_8B_STEP]
    return [
        llama("Llama 1024x4", 1024, 4, 4, 128),
        llama("Llama 2048x2", 2048, 2, 4, 128),
    ]


def run(case: ModelCase, options: Options) -> Iterator[Row]:
    """Yield rows of bytes beyond the baseline.

    "peak" is that of forward, backward and AdamW; "saved" is what a forward saves for backward.
    """
    batch, twins = make_batch(case, options.device), Twins(case, options.device)
    gate = check(case, twins, batch)
    frozen = next(peer for peer in peers() if peer.name == BASELINE)
    baseline: dict[str, int] | None = None
    for peer in (frozen, *(peer for peer in options.peers if peer is not frozen)):
        if peer.wrap is None or peer.name == "frozen again":
            continue
        blank = blank_row("memory", case, "", "bytes", peer, options)
        try:
            if not gate.passed:
                raise Absent("the gate did not pass")
            wrapped = peer.wrap(twins.fresh(), case)
            step = training_step(wrapped, batch)
            step()
        except (Absent, RuntimeError) as error:
            for metric in ("peak", "saved"):
                yield dataclasses.replace(blank, metric=metric, gate=gate, absent=first_line(error))
            continue
        sizes = {
            "peak": traffic(step, options.device).peak,
            "saved": saved_bytes(partial(wrapped.loss, batch), wrapped.model),
        }
        if baseline is None:
            baseline = sizes
            continue
        for metric, size in sizes.items():
            yield dataclasses.replace(
                blank,
                metric=metric,
                value=size - baseline[metric],
                baseline=BASELINE,
                gate=gate if wrapped.same_as_reference else None,
            )


SUITE = Suite("memory", "bytes of a training step, over the frozen baseline", cases, run)
