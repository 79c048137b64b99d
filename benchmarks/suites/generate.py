"""Generation: the prompt, and each token after it, which no edit may touch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.allocations import operations, traffic
from benchmarks.cases import LLAMA_1B, ModelCase, llama
from benchmarks.peers import Absent, Wrapped
from benchmarks.result_rows import Row
from benchmarks.suites import Options, Suite, row
from benchmarks.suites.models import Twins, check, make_batch
from benchmarks.timing import Clock, Run, interleave, paired_ratio, quantiles

#: Tokens decoded in a timed run.
TOKENS = 16
#: The peer's name of the model without any adapter; measured where the floor of training is.
BASE, FLOOR = "base", "frozen"


def cases(size: str) -> list[ModelCase]:
    """The whole sequence is the prompt."""
    if size == "ci":
        return [llama("Llama 64x2", 64, 2, 2, 16, vocabulary=64, positions="f3+l3", rank=4)]
    if size == "gpu":
        return [LLAMA_1B.but(batch=1), LLAMA_1B]
    return [
        llama("Llama 1024x4", 1024, 4, 1, 128),
        llama("Llama 1024x4", 1024, 4, 8, 128),
    ]


def run(case: ModelCase, options: Options) -> Iterator[Row]:
    """Rows "prefill" and "decode" (a token) in seconds, and what decoding a token adds to the
    base's operators and allocated bytes."""
    device = options.device
    clock, twins = Clock(device), Twins(case, device)
    prompts = make_batch(case, device)["input_ids"]
    gate = check(case, twins, make_batch(case, device))
    runs: dict[str, Run] = {}
    kept: dict[str, Row] = {}
    counts: dict[str, dict[str, int]] = {}
    for peer in options.peers:
        if peer.wrap is None or peer.name in ("frozen again", "reference", "ours, untied"):
            continue
        blank = row("generate", case, "", "s", peer, options)
        try:
            if peer.name == FLOOR:
                blank = dataclasses.replace(blank, peer=BASE)
                wrapped = _bare(twins.one())
            elif not gate.passed:
                raise Absent("the gate did not pass")
            else:
                wrapped = peer.wrap(twins.one(), case)
            if wrapped.generate is None:
                continue
            set_eval(wrapped)
            with torch.no_grad():
                wrapped.generate(prompts, 2)
                counts[blank.peer] = _decoding(wrapped, prompts, device)
        except (Absent, RuntimeError, AttributeError, TypeError) as error:
            for metric in ("prefill", "decode"):
                says = str(error).splitlines()[0][:300]
                failed = None if gate.passed else gate
                yield dataclasses.replace(blank, metric=metric, gate=failed, absent=says)
            continue
        runs[blank.peer] = partial(_timed, clock, wrapped, prompts)
        kept[blank.peer] = dataclasses.replace(
            blank, baseline=BASE, gate=gate if wrapped.same_as_reference else None
        )
    samples = interleave(runs, options.effort)
    for name, blank in kept.items():
        for metric, seconds in samples[name].items():
            reference = samples.get(BASE, {}).get(metric)
            yield dataclasses.replace(blank, metric=metric).timed(
                quantiles(seconds), None if reference is None else paired_ratio(seconds, reference)
            )
        if name == BASE or BASE not in counts:
            continue
        for metric, unit in (("decode_operations", "count"), ("decode_bytes", "bytes")):
            more = counts[name][metric] - counts[BASE][metric]
            yield dataclasses.replace(blank, metric=metric, unit=unit, value=more)


def _bare(base: nn.Module) -> Wrapped:
    def generate(prompts: Tensor, count: int) -> Tensor:
        tokens: Tensor = base.generate(  # type: ignore[operator]
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        return tokens

    return Wrapped(lambda batch: base(**batch).loss, [], base, generate)


def set_eval(wrapped: Wrapped) -> None:
    """Put a wrapped model into evaluation mode."""
    wrapped.model.eval()
    inner = getattr(wrapped.model, "model", None)  # pyreft's own eval() stops at its wrapper
    if isinstance(inner, nn.Module):
        inner.eval()


def _timed(clock: Clock, wrapped: Wrapped, prompts: Tensor) -> Mapping[str, float]:
    """One token is the prompt's work; the others are decoded."""
    generate = wrapped.generate
    assert generate is not None
    with torch.no_grad():
        times = clock(one=lambda: generate(prompts, 1), more=lambda: generate(prompts, 1 + TOKENS))
    return {"prefill": times["one"], "decode": (times["more"] - times["one"]) / TOKENS}


def _decoding(wrapped: Wrapped, prompts: Tensor, device: torch.device) -> dict[str, int]:
    """Operators and bytes of one more token, the fourth: caches grow, so each token has its own."""
    generate = wrapped.generate
    assert generate is not None
    few, more = (partial(generate, prompts, count) for count in (4, 5))
    return {
        "decode_operations": operations(more) - operations(few),
        "decode_bytes": traffic(more, device).allocated - traffic(few, device).allocated,
    }


SUITE = Suite("generate", "prefill, and a decoded token, over the base model's own", cases, run)
