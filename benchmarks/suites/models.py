"""Suites "step" and "layer": a training step of whole models and of two decoder layers."""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import DTYPES, LLAMA_1B, LLAMA_8B, ROBERTA_BASE, ModelCase, llama
from benchmarks.gate import check_losses
from benchmarks.op_overhead import added_seconds, profiled
from benchmarks.peers import Absent, Wrapped
from benchmarks.peers.ours import wrap as wrap_ours
from benchmarks.peers.reference import prompt_length
from benchmarks.peers.reference import wrap as wrap_reference
from benchmarks.result_rows import Gate, Row
from benchmarks.suites import Options, Suite, blank_row, first_line
from benchmarks.timing import Clock, Run, interleave, quantiles

#: The peer that training steps are compared with: the frozen model.
BASELINE = "frozen"
#: The weights take 15 GiB, and a step of LoRA with this batch another 6 GiB (``footprint.py``).
LLAMA_8B_STEP = LLAMA_8B.but(batch=2, sequence=384)
#: Largest number of rounds under the profiler.
_PROFILES = 5


def step_cases(size: str) -> list[ModelCase]:
    """Whole models, then families of a small model in which one field varies."""
    if size == "ci":
        return [llama("Llama 64x2", 64, 2, 2, 32, vocabulary=64, positions="f3+l3", rank=4)]
    if size == "gpu":
        return [LLAMA_8B_STEP, LLAMA_1B, ROBERTA_BASE, *_families(LLAMA_1B.but(layers=8))]
    wide = llama("Llama 1024x4", 1024, 4, 4, 256)
    return [
        wide,
        wide.but(dtype="bf16"),
        llama("Llama 2048x2", 2048, 2, 4, 128),
        llama("Llama 4096x2", 4096, 2, 2, 128),
        *_families(llama("Llama 512x4", 512, 4, 4, 128)),
    ]


def _families(base: ModelCase) -> list[ModelCase]:
    """Cases that differ from ``base`` in a single field."""
    fields: dict[str, Sequence[dict[str, Any]]] = {
        "positions": [{"positions": p} for p in ("f1", "f7+l7", "f20+l20", "prompt")],
        "rank": [{"rank": r} for r in (1, 8, 32, 64)],
        "layers": [{"edited": n} for n in (1, base.layers // 2, base.layers)],
        "sequence": [{"sequence": s} for s in (64, 128, 256)],
    }
    return [base.but(sweep=name, **field) for name, many in fields.items() for field in many]


def layer_cases(size: str) -> list[ModelCase]:
    """Two decoder layers and a small vocabulary; backward goes through one of the layers."""
    if size == "ci":
        return [llama("Llama layer 64", 64, 2, 2, 32, vocabulary=64, positions="f3+l3", rank=4)]
    if size == "gpu":
        return [
            model.but(name=f"{model.name} layer", layers=2, vocabulary=1024)
            for model in (LLAMA_1B, LLAMA_8B)
        ]
    return [llama(f"Llama layer {dim}", dim, 2, 4, 128) for dim in (1024, 2048)]


class Twins:
    """Base models of a case that share their frozen weights and nothing else."""

    def __init__(self, case: ModelCase, device: torch.device) -> None:
        self._first = build(case, device).requires_grad_(False)

    def fresh(self) -> nn.Module:
        """A new model without hooks."""
        shared = {id(parameter): parameter for parameter in self._first.parameters()}
        return copy.deepcopy(self._first, shared).train()


def build(case: ModelCase, device: torch.device) -> nn.Module:
    """The base model of a case with random weights; every call gives the same weights."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    shared: dict[str, Any] = {
        "hidden_size": case.hidden,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "intermediate_size": case.intermediate,
        "vocab_size": case.vocabulary,
    }
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[case.dtype])
    try:
        with torch.device(device):
            if case.model == "roberta":
                model: nn.Module = RobertaForSequenceClassification(
                    RobertaConfig(
                        **shared,
                        max_position_embeddings=case.sequence + 2,
                        hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0,
                    )
                )  # fmt: skip
            else:
                model = LlamaForCausalLM(
                    LlamaConfig(
                        **shared,
                        num_key_value_heads=case.kv_heads,
                        max_position_embeddings=max(2048, case.sequence),
                        pad_token_id=0,
                    )
                )
    finally:
        torch.set_default_dtype(before)
    return model.train()


def make_batch(case: ModelCase, device: torch.device) -> dict[str, Tensor]:
    """Random tokens without padding; the first half of each sequence is the prompt."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, case.vocabulary, (case.batch, case.sequence), generator=random)
    labels = ids.clone()
    labels[:, : prompt_length(case)] = -100
    if case.model == "roberta":
        labels = torch.randint(0, 2, (case.batch,), generator=random)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def share_weights(ours: Wrapped, reference: Wrapped) -> None:
    """Move the parameters of ours off their initialisation and copy them to the reference."""
    adapter = ours.model.get_submodule("reft").adapter("default")
    with torch.no_grad():
        random = torch.Generator().manual_seed(3)
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.add_(noise.to(parameter) * 0.02)
    reference.model.load(adapter.training_state(), training_state=True)


def check(case: ModelCase, twins: Twins, batch: Mapping[str, Tensor], tied: bool = True) -> Gate:
    """Compare the loss of our wrapped model with that of the reference in plain hooks."""
    ours = wrap_ours(tied, twins.fresh(), case)
    reference = wrap_reference(tied, twins.fresh(), case)
    share_weights(ours, reference)
    with torch.no_grad():
        loss, expected = float(ours.loss(batch)), float(reference.loss(batch))
        plain = float(twins.fresh()(**batch).loss)
    gate = check_losses(loss, expected, DTYPES[case.dtype])
    if gate.passed and expected == plain:
        return Gate(False, "the edit does not change the loss, so the check compared nothing")
    return gate


def training_step(wrapped: Wrapped, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    """A function that runs forward, backward and AdamW."""
    parameters = list(wrapped.parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0) if parameters else None

    def run() -> None:
        wrapped.loss(batch).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def run(suite: str, case: ModelCase, options: Options) -> Iterator[Row]:
    """Yield the rows "step" of every peer with ratios to the baseline; on a CPU also "op_overhead".

    On a GPU, which is not shared with other work, whole steps are exact enough.
    """
    device = options.device
    clock, batch, twins = Clock(device), make_batch(case, device), Twins(case, device)
    gates = {True: check(case, twins, batch)}
    if "+" in case.positions:
        gates[False] = check(case, twins, batch, tied=False)
    steps: dict[str, Callable[[], object]] = {}
    blanks: dict[str, Row] = {}
    for peer in options.peers:
        if peer.wrap is None:
            continue
        blank = blank_row(suite, case, "step", "s", peer, options)
        gate = gates.get("untied" not in peer.name, gates[True])
        if not gate.passed:
            yield dataclasses.replace(blank, gate=gate, absent="the gate did not pass")
            continue
        try:
            wrapped = peer.wrap(twins.fresh(), case)
            step = training_step(wrapped, batch)
            step()
        except (Absent, RuntimeError) as error:
            yield dataclasses.replace(blank, absent=first_line(error))
            continue
        checked = gate if wrapped.same_as_reference else None
        blanks[peer.name] = dataclasses.replace(blank, gate=checked, baseline=BASELINE)
        steps[peer.name] = step
    runs: dict[str, Run] = {name: partial(clock, step=step) for name, step in steps.items()}
    # Each step has run once, which is enough warm-up for steps of seconds.
    samples = interleave(runs, dataclasses.replace(options.effort, warmup=0))
    rounds = min(_PROFILES, options.effort.min_rounds)
    added = _added_seconds(steps, rounds) if device.type != "cuda" and BASELINE in steps else {}
    baseline = samples.get(BASELINE, {}).get("step")
    for name, blank in blanks.items():
        yield blank.with_rounds(samples[name]["step"], baseline)
        if baseline is not None and name in added:
            seconds = quantiles(baseline).median
            times = [seconds + more for more in added[name]]
            yield dataclasses.replace(blank, metric="op_overhead").timed(
                quantiles(times), quantiles([time / seconds for time in times])
            )
    runs.clear()
    steps.clear()
    gc.collect()


def _added_seconds(
    steps: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Map each peer to the seconds that it adds to the baseline, an entry per round."""
    profiled(lambda: None)  # start the profiler
    added: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        profiles = {name: profiled(step) for name, step in steps.items()}
        for name, profile in profiles.items():
            added[name].append(added_seconds(profile, profiles[BASELINE]))
    return added


LAYER = Suite("layer", "a training step of two decoder layers", layer_cases, partial(run, "layer"))
STEP = Suite("step", "a training step of whole models", step_cases, partial(run, "step"))
