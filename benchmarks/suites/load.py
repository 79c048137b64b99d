"""Suite "load": time to wrap a model, to save an adapter and to load it."""

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
from benchmarks.suites import Options, Suite, blank_row, first_line
from benchmarks.suites.models import build
from benchmarks.timing import Clock, Run, interleave

#: Largest number of layers for pyreft, which completes each R to D × D: six seconds per layer.
_FEW_LAYERS = 4


def cases(size: str) -> list[ModelCase]:
    """A small model, and the shape of a large one whose weights are expanded scalars."""
    if size == "ci":
        return [llama("Llama 64x2", 64, 2, 2, 32, vocabulary=64, positions="f3+l3", rank=4)]
    return [
        llama("Llama 1024x4", 1024, 4, 1, 128),
        LLAMA_8B.but(dtype="bf16", batch=1),
    ]


def hollow_model(case: ModelCase, device: torch.device) -> nn.Module:
    """The base model with its shapes and nearly no memory: each weight is an expanded scalar."""
    model = build(case, torch.device("meta"))
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            expanded = torch.zeros(1, dtype=weight.dtype, device=device).expand(weight.shape)
            setattr(module, name, nn.Parameter(expanded, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
    return model


def run(case: ModelCase, options: Options) -> Iterator[Row]:
    """Yield rows "wrap", "save" and "load" in seconds."""
    clock = Clock(options.device)
    runs: dict[str, Run] = {}
    blanks: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for peer in options.peers:
            if peer.wrap is None or peer.load is None:
                continue
            blank = blank_row("load", case, "", "s", peer, options)
            blank = dataclasses.replace(blank, baseline="ours")
            try:
                if peer.name == "pyreft" and case.layers > _FEW_LAYERS and case.hidden >= 4096:
                    raise Absent(
                        "takes minutes: it completes each R to D × D; see the cases with fewer "
                        "layers"
                    )
                timed = _wrap_save_load(clock, peer, case, options.device, Path(scratch))
                timed()
            except (Absent, RuntimeError, TypeError) as error:
                for metric in ("wrap", "save", "load"):
                    yield dataclasses.replace(blank, metric=metric, absent=first_line(error))
                continue
            runs[peer.name] = timed
            blanks[peer.name] = blank
        samples = interleave(runs, dataclasses.replace(options.effort, warmup=0, max_rounds=10))
    for name, blank in blanks.items():
        for metric, seconds in samples[name].items():
            ours = samples.get("ours", {}).get(metric)
            yield dataclasses.replace(blank, metric=metric).with_rounds(seconds, ours)


def _wrap_save_load(
    clock: Clock, peer: Peer, case: ModelCase, device: torch.device, scratch: Path
) -> Run:
    assert peer.wrap is not None and peer.load is not None
    wrap, load = peer.wrap, peer.load
    wrapped: list[Wrapped] = []

    def run() -> dict[str, float]:
        first, second = hollow_model(case, device), hollow_model(case, device)
        folder = tempfile.mkdtemp(dir=scratch)
        wrapped.clear()

        def save() -> None:
            assert wrapped[0].save is not None
            wrapped[0].save(folder)

        return clock(
            wrap=lambda: wrapped.append(wrap(first, case)),
            save=save,
            load=lambda: load(second, folder),
        )

    return run


SUITE = Suite("load", "time to wrap a model, to save an adapter and to load it", cases, run)
