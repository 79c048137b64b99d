"""Suite "generate": the prompt, and each token after it, which no edit touches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.allocations import operations, traffic
from benchmarks.cases import LLAMA_1B, ModelCase, llama
from benchmarks.peers import Absent, Wrapped
from benchmarks.peers.model_calls import greedy_generation, loss_of
from benchmarks.result_rows import Row
from benchmarks.suites import Options, Suite, blank_row, first_line
from benchmarks.suites.models import BASELINE, Twins, check, make_batch
from benchmarks.timing import Clock, Run, interleave

#: Tokens decoded in a timed run.
TOKENS = 16
#: The peer name of the model without an adapter; it takes the place of the training baseline.
BASE = "base"
_SKIPPED = ("frozen again", "reference", "ours, untied")


def cases(size: str) -> list[ModelCase]:
    """Cases whose whole sequence is the prompt."""
    if size == "ci":
        return [llama("Llama 64x2", 64, 2, 2, 16, vocabulary=64, positions="f3+l3", rank=4)]
    if size == "gpu":
        return [LLAMA_1B.but(batch=1), LLAMA_1B]
    return [
        llama("Llama 1024x4", 1024, 4, 1, 128),
        llama("Llama 1024x4", 1024, 4, 8, 128),
    ]


def run(case: ModelCase, options: Options) -> Iterator[Row]:
    """Yield rows of prefill and decoding.

    "prefill" and "decode" (per token) are seconds. "decode_operations" and "decode_bytes" are the
    operators and the allocated bytes that decoding a token adds to the base.
    """
    device = options.device
    clock, twins = Clock(device), Twins(case, device)
    prompts = make_batch(case, device)["input_ids"]
    gate = check(case, twins, make_batch(case, device))
    runs: dict[str, Run] = {}
    blanks: dict[str, Row] = {}
    counts: dict[str, dict[str, int]] = {}
    for peer in options.peers:
        if peer.wrap is None or peer.name in _SKIPPED:
            continue
        blank = blank_row("generate", case, "", "s", peer, options)
        try:
            if peer.name == BASELINE:
                blank = dataclasses.replace(blank, peer=BASE)
                base = twins.fresh()
                wrapped = Wrapped(loss_of(base), [], base, greedy_generation(base))
            elif not gate.passed:
                raise Absent("the gate did not pass")
            else:
                wrapped = peer.wrap(twins.fresh(), case)
            if wrapped.generate is None:
                continue
            set_eval(wrapped)
            with torch.no_grad():
                wrapped.generate(prompts, 2)
                counts[blank.peer] = _decoding_counts(wrapped, prompts, device)
        except (Absent, RuntimeError, AttributeError, TypeError) as error:
            failed = None if gate.passed else gate
            for metric in ("prefill", "decode"):
                yield dataclasses.replace(
                    blank, metric=metric, gate=failed, absent=first_line(error)
                )
            continue
        runs[blank.peer] = partial(_timed, clock, wrapped, prompts)
        blanks[blank.peer] = dataclasses.replace(
            blank, baseline=BASE, gate=gate if wrapped.same_as_reference else None
        )
    samples = interleave(runs, options.effort)
    for name, blank in blanks.items():
        for metric, seconds in samples[name].items():
            base_seconds = samples.get(BASE, {}).get(metric)
            yield dataclasses.replace(blank, metric=metric).with_rounds(seconds, base_seconds)
        if name == BASE or BASE not in counts:
            continue
        for metric, unit in (("decode_operations", "count"), ("decode_bytes", "bytes")):
            added = counts[name][metric] - counts[BASE][metric]
            yield dataclasses.replace(blank, metric=metric, unit=unit, value=added)


def set_eval(wrapped: Wrapped) -> None:
    """Put a wrapped model into evaluation mode."""
    wrapped.model.eval()
    inner = getattr(wrapped.model, "model", None)  # eval() of pyreft does not reach this model
    if isinstance(inner, nn.Module):
        inner.eval()


def _timed(clock: Clock, wrapped: Wrapped, prompts: Tensor) -> Mapping[str, float]:
    """Time the first token, which includes the prompt, and the tokens after it."""
    generate = wrapped.generate
    assert generate is not None
    with torch.no_grad():
        times = clock(first=lambda: generate(prompts, 1), all=lambda: generate(prompts, 1 + TOKENS))
    return {"prefill": times["first"], "decode": (times["all"] - times["first"]) / TOKENS}


def _decoding_counts(wrapped: Wrapped, prompts: Tensor, device: torch.device) -> dict[str, int]:
    """Operators and bytes of the fifth token; caches grow, so all peers decode the same token."""
    generate = wrapped.generate
    assert generate is not None
    four, five = (partial(generate, prompts, count) for count in (4, 5))
    return {
        "decode_operations": operations(five) - operations(four),
        "decode_bytes": traffic(five, device).allocated - traffic(four, device).allocated,
    }


SUITE = Suite("generate", "prefill and decoding, over the base model", cases, run)
