"""A training step of whole models, and of two decoder layers, over the frozen model's own."""

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
from benchmarks.op_overhead import added, profiled
from benchmarks.peers import Absent, Wrapped
from benchmarks.peers.ours import wrap as wrap_ours
from benchmarks.peers.reference import prompt_length
from benchmarks.peers.reference import wrap as wrap_reference
from benchmarks.result_rows import Gate, Row
from benchmarks.suites import Options, Suite, row
from benchmarks.timing import Clock, Run, interleave, paired_ratio, quantiles

FLOOR = "frozen"
#: Its weights take 15 GiB; with this batch a step of LoRA needs 6 more (``footprint.py``).
LLAMA_8B_STEP = LLAMA_8B.but(batch=2, sequence=384)
#: Rounds under the profiler at most.
_PROFILES = 5


def step_cases(size: str) -> list[ModelCase]:
    """Whole models, then families of a small one in which one thing varies."""
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
    """Cases that differ from ``base`` in one field."""
    fields: dict[str, Sequence[dict[str, Any]]] = {
        "positions": [{"positions": p} for p in ("f1", "f7+l7", "f20+l20", "prompt")],
        "rank": [{"rank": r} for r in (1, 8, 32, 64)],
        "layers": [{"edited": n} for n in (1, base.layers // 2, base.layers)],
        "sequence": [{"sequence": s} for s in (64, 128, 256)],
    }
    return [base.but(sweep=name, **one) for name, many in fields.items() for one in many]


def layer_cases(size: str) -> list[ModelCase]:
    """Two decoder layers and next to no vocabulary: backward goes through one of them."""
    if size == "ci":
        return [llama("Llama layer 64", 64, 2, 2, 32, vocabulary=64, positions="f3+l3", rank=4)]
    if size == "gpu":
        return [
            dataclasses.replace(one, name=f"{one.name} layer", layers=2, vocabulary=1024)
            for one in (LLAMA_1B, LLAMA_8B)
        ]
    return [llama(f"Llama layer {dim}", dim, 2, 4, 128) for dim in (1024, 2048)]


class Twins:
    """Base models of one case that share their frozen weights, hooks and all else their own."""

    def __init__(self, case: ModelCase, device: torch.device) -> None:
        self._first = build(case, device).requires_grad_(False)

    def one(self) -> nn.Module:
        """A fresh model."""
        shared = {id(one): one for one in self._first.parameters()}
        return copy.deepcopy(self._first, shared).train()


def build(case: ModelCase, device: torch.device) -> nn.Module:
    """The base model of a case with random weights, the same in every call."""
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
    """Random tokens, nothing padded; the first half of each sequence is the prompt."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, case.vocabulary, (case.batch, case.sequence), generator=random)
    labels = ids.clone()
    labels[:, : prompt_length(case)] = -100
    if case.model == "roberta":
        labels = torch.randint(0, 2, (case.batch,), generator=random)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def share_weights(ours: Wrapped, reference: Wrapped) -> None:
    """Give the reference's bank the parameters of ours, moved off their starting point."""
    target = reference.model
    bank = ours.model.get_submodule("reft").bank("default")
    with torch.no_grad():
        random = torch.Generator().manual_seed(3)
        for one in bank.parameters():
            one.add_(torch.randn(one.shape, generator=random).to(one) * 0.02)
    target.load(bank.training_state(), training_state=True)


def check(case: ModelCase, twins: Twins, batch: Mapping[str, Tensor], tied: bool = True) -> Gate:
    """Whether our wrapped model has the loss of the reference in plain hooks, same weights."""
    ours = wrap_ours(tied, twins.one(), case)
    reference = wrap_reference(tied, twins.one(), case)
    share_weights(ours, reference)
    with torch.no_grad():
        found, wanted = float(ours.loss(batch)), float(reference.loss(batch))
        plain = float(twins.one()(**batch).loss)
    gate = check_losses(found, wanted, DTYPES[case.dtype])
    if gate.passed and wanted == plain:
        return Gate(False, "the edit does not reach the loss: nothing was compared")
    return gate


def step(wrapped: Wrapped, batch: Mapping[str, Tensor]) -> Any:
    """A training step: forward, backward, AdamW on what is trained."""
    parameters = list(wrapped.parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0) if parameters else None

    def run() -> None:
        wrapped.loss(batch).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def run(suite: str, case: ModelCase, options: Options) -> Iterator[Row]:
    """Row "step" of every peer, its ratio to the floor; on a CPU also "counted"."""
    device = options.device
    clock, batch, twins = Clock(device), make_batch(case, device), Twins(case, device)
    gates = {True: check(case, twins, batch)}
    if "+" in case.positions:
        gates[False] = check(case, twins, batch, tied=False)
    runs: dict[str, Run] = {}
    steps: dict[str, Callable[[], object]] = {}
    kept: dict[str, Row] = {}
    for peer in options.peers:
        if peer.wrap is None:
            continue
        blank = row(suite, case, "step", "s", peer, options)
        gate = gates.get("untied" not in peer.name, gates[True])
        if not gate.passed:
            yield dataclasses.replace(blank, gate=gate, absent="the gate did not pass")
            continue
        try:
            wrapped = peer.wrap(twins.one(), case)
            once = step(wrapped, batch)
            once()
        except (Absent, RuntimeError) as error:
            yield dataclasses.replace(blank, absent=str(error).splitlines()[0][:300])
            continue
        judged = gate if wrapped.same_as_reference else None
        kept[peer.name] = dataclasses.replace(blank, gate=judged, baseline=FLOOR)
        runs[peer.name] = partial(clock, step=once)
        steps[peer.name] = once
    # Each has run once: that is warm enough for steps of seconds.
    samples = interleave(runs, dataclasses.replace(options.effort, warmup=0))
    # On a GPU there is nobody else, and whole steps are told apart.
    rounds = min(_PROFILES, options.effort.min_rounds)
    counted = _counted(steps, rounds) if device.type != "cuda" and FLOOR in steps else {}
    for name, blank in kept.items():
        seconds = samples[name]["step"]
        floor = samples.get(FLOOR, {}).get("step")
        yield blank.timed(
            quantiles(seconds), None if floor is None else paired_ratio(seconds, floor)
        )
        if floor is not None and name in counted:
            whole = quantiles(floor).median
            times = [whole + one for one in counted[name]]
            yield dataclasses.replace(blank, metric="counted").timed(
                quantiles(times), quantiles([one / whole for one in times])
            )
    runs.clear()
    steps.clear()
    gc.collect()


def _counted(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Peer -> seconds it adds to the floor, one entry a round; the peers in turns."""
    profiled(lambda: None)  # the profiler's own start
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        profiles = {name: profiled(once) for name, once in steps.items()}
        for name, one in profiles.items():
            found[name].append(added(one, profiles[FLOOR]))
    return found


LAYER = Suite("layer", "a training step of two decoder layers", layer_cases, partial(run, "layer"))
STEP = Suite("step", "a training step of whole models", step_cases, partial(run, "step"))
