"""How long it takes to wrap a model, to save an adapter and to load it again."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks.cases import LLAMA_8B, ModelCase, llama
from benchmarks.peers import Absent, Peer, Wrapped
from benchmarks.result_rows import Row
from benchmarks.suites import Options, Suite, row
from benchmarks.suites.models import build
from benchmarks.timing import Clock, Run, interleave, paired_ratio, quantiles

#: pyreft completes each R to D × D: about six seconds a layer at this width.
_FEW_LAYERS = 4


def cases(size: str) -> list[ModelCase]:
    """The last is as large as people's models are; its weights are one number, stretched."""
    if size == "ci":
        return [llama("Llama 64x2", 64, 2, 2, 32, vocabulary=64, positions="f3+l3", rank=4)]
    return [
        llama("Llama 1024x4", 1024, 4, 1, 128),
        LLAMA_8B.but(dtype="bf16", batch=1),
    ]


def hollow(case: ModelCase, device: torch.device) -> nn.Module:
    """The base model with all its shapes and next to no memory."""
    model = build(case, torch.device("meta"))
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            stretched = torch.zeros(1, dtype=weight.dtype, device=device).expand(weight.shape)
            setattr(module, name, nn.Parameter(stretched, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
    return model


def run(case: ModelCase, options: Options) -> Iterator[Row]:
    """Rows "wrap", "save" and "load" in seconds."""
    clock = Clock(options.device)
    runs: dict[str, Run] = {}
    kept: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for peer in options.peers:
            if peer.wrap is None or peer.load is None:
                continue
            blank = dataclasses.replace(row("load", case, "", "s", peer, options), baseline="ours")
            try:
                if peer.name == "pyreft" and case.layers > _FEW_LAYERS and case.hidden >= 4096:
                    raise Absent("minutes: it completes each layer's R to D × D, see fewer layers")
                once = _once(clock, peer, case, options.device, Path(scratch))
                once()
            except (Absent, RuntimeError, TypeError) as error:
                for metric in ("wrap", "save", "load"):
                    says = str(error).splitlines()[0][:300]
                    yield dataclasses.replace(blank, metric=metric, absent=says)
                continue
            runs[peer.name] = once
            kept[peer.name] = blank
        samples = interleave(runs, dataclasses.replace(options.effort, warmup=0, max_rounds=10))
    for name, blank in kept.items():
        for metric, seconds in samples[name].items():
            reference = samples.get("ours", {}).get(metric)
            yield dataclasses.replace(blank, metric=metric).timed(
                quantiles(seconds), None if reference is None else paired_ratio(seconds, reference)
            )


def _once(clock: Clock, peer: Peer, case: ModelCase, device: torch.device, scratch: Path) -> Run:
    assert peer.wrap is not None and peer.load is not None
    wrap, load = peer.wrap, peer.load
    made: list[Wrapped] = []

    def run() -> dict[str, float]:
        first, second = hollow(case, device), hollow(case, device)
        folder = tempfile.mkdtemp(dir=scratch)
        made.clear()

        def save() -> None:
            assert made[0].save is not None
            made[0].save(folder)

        return clock(
            wrap=lambda: made.append(wrap(first, case)),
            save=save,
            load=lambda: load(second, folder),
        )

    return run


SUITE = Suite("load", "time to wrap a model, to save an adapter and to load it", cases, run)
