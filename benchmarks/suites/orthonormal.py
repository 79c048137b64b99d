"""Suite "orthonormal": R of all layers of a model, forward and backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.cases import RotationCase
from benchmarks.peers import Absent, Rotation
from benchmarks.result_rows import Gate, Row
from benchmarks.suites import Options, Suite, blank_row
from benchmarks.timing import Clock, Run, interleave

#: Largest |R Rᵀ − I| in float32 that passes.
_TOLERANCE = 1e-4


def cases(size: str) -> list[RotationCase]:
    """Few layers at large D: torch completes each R to D × D, which takes seconds per layer."""
    if size == "ci":
        return [RotationCase(64, 4, 2)]
    # On a GPU the shapes of whole models come first: 8B and 1B.
    models = [RotationCase(4096, 8, 32), RotationCase(2048, 8, 16)] if size == "gpu" else []
    return models + [
        RotationCase(dim, rank, {768: 12, 2048: 4, 4096: 2}[dim])
        for dim in (768, 2048, 4096)
        for rank in (4, 8, 32)
    ]


def run(case: RotationCase, options: Options) -> Iterator[Row]:
    """Yield rows "forward+backward" in seconds and "buffers" in bytes."""
    clock = Clock(options.device)
    runs: dict[str, Run] = {}
    blanks: dict[str, tuple[Row, int]] = {}
    for peer in options.peers:
        if peer.rotation is None:
            continue
        blank = blank_row("orthonormal", case, "forward+backward", "s", peer, options)
        try:
            rotation = peer.rotation(case, options.device)
        except Absent as error:
            yield dataclasses.replace(blank, absent=str(error))
            continue
        gate = check_orthonormal(rotation.call())
        blank = dataclasses.replace(blank, gate=gate, baseline="ours")
        if not gate.passed:
            yield dataclasses.replace(blank, absent="the gate did not pass")
            continue
        runs[peer.name] = _timed(clock, rotation)
        blanks[peer.name] = blank, rotation.buffers
    samples = interleave(runs, options.effort)
    for name, (blank, buffers) in blanks.items():
        yield blank.with_rounds(samples[name]["both"], samples.get("ours", {}).get("both"))
        yield dataclasses.replace(
            blank, metric="buffers", unit="bytes", value=buffers, baseline=None
        )


def check_orthonormal(rotations: Sequence[Tensor]) -> Gate:
    """Check that every R, (r, D) or (D, r), is orthonormal."""
    error = 0.0
    for rotation in rotations:
        matrix = rotation.detach().double()
        tall = matrix.shape[0] > matrix.shape[1]
        gram = matrix.mT @ matrix if tall else matrix @ matrix.mT
        error = max(error, float((gram - torch.eye(len(gram), device=gram.device)).abs().max()))
    return Gate(error <= _TOLERANCE, f"max |R Rᵀ − I| {error:.1e}, allowed {_TOLERANCE:.0e}")


def _timed(clock: Clock, rotation: Rotation) -> Run:
    upstream = [torch.randn_like(matrix) for matrix in rotation.call()]

    def both() -> None:
        torch.autograd.grad(rotation.call(), rotation.leaves, upstream)

    def run() -> Mapping[str, float]:
        return {"both": clock(both=both)["both"]}

    return run


SUITE = Suite("orthonormal", "orthonormal R of all layers, forward and backward", cases, run)
