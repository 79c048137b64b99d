"""Orthonormal R of all layers of a model, forward and backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.cases import RotationCase
from benchmarks.peers import Absent, Rotation
from benchmarks.result_rows import Gate, Row
from benchmarks.suites import Options, Suite, row
from benchmarks.timing import Clock, Run, interleave, paired_ratio, quantiles

#: Largest |R Rᵀ − I| in float32 that passes.
_WITHIN = 1e-4


def cases(size: str) -> list[RotationCase]:
    """Layers are few at large D: torch completes each R to D × D, seconds a layer."""
    if size == "ci":
        return [RotationCase(64, 4, 2)]
    # On a GPU whole models first: 8B and 1B.
    whole = [RotationCase(4096, 8, 32), RotationCase(2048, 8, 16)] if size == "gpu" else []
    return whole + [
        RotationCase(dim, rank, {768: 12, 2048: 4, 4096: 2}[dim])
        for dim in (768, 2048, 4096)
        for rank in (4, 8, 32)
    ]


def run(case: RotationCase, options: Options) -> Iterator[Row]:
    """Rows "forward+backward" in seconds and "buffers" in bytes."""
    clock = Clock(options.device)
    runs: dict[str, Run] = {}
    kept: dict[str, tuple[Row, int]] = {}
    for peer in options.peers:
        if peer.rotation is None:
            continue
        blank = row("orthonormal", case, "forward+backward", "s", peer, options)
        try:
            rotation = peer.rotation(case, options.device)
        except Absent as error:
            yield dataclasses.replace(blank, absent=str(error))
            continue
        gate = check_rotation(rotation.call())
        blank = dataclasses.replace(blank, gate=gate, baseline="ours")
        if not gate.passed:
            yield dataclasses.replace(blank, absent="the gate did not pass")
            continue
        runs[peer.name] = _timed(clock, rotation)
        kept[peer.name] = blank, rotation.buffers
    samples = interleave(runs, options.effort)
    for name, (blank, buffers) in kept.items():
        seconds = samples[name]["both"]
        reference = samples.get("ours", {}).get("both")
        yield blank.timed(
            quantiles(seconds), None if reference is None else paired_ratio(seconds, reference)
        )
        yield dataclasses.replace(
            blank, metric="buffers", unit="bytes", value=buffers, baseline=None
        )


def check_rotation(found: Sequence[Tensor]) -> Gate:
    """Whether every R is orthonormal, be it (r, D) or (D, r)."""
    error = 0.0
    for one in found:
        wide = one.detach().double()
        gram = wide.mT @ wide if wide.shape[0] > wide.shape[1] else wide @ wide.mT
        error = max(error, float((gram - torch.eye(len(gram), device=gram.device)).abs().max()))
    return Gate(error <= _WITHIN, f"max |R Rᵀ − I| {error:.1e}, allowed {_WITHIN:.0e}")


def _timed(clock: Clock, rotation: Rotation) -> Run:
    upstream = [torch.randn_like(one) for one in rotation.call()]

    def both() -> None:
        torch.autograd.grad(rotation.call(), rotation.leaves, upstream)

    def run() -> Mapping[str, float]:
        return {"both": clock(both=both)["both"]}

    return run


SUITE = Suite("orthonormal", "orthonormal R of all layers, forward and backward", cases, run)
