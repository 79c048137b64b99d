"""GPU memory estimates: within the limit, and above the allocations of small cases."""

from __future__ import annotations

import pytest
import torch

from benchmarks import sweep
from benchmarks.allocations import traffic
from benchmarks.cases import LLAMA_8B, ModelCase, OpCase, llama
from benchmarks.gate import OpGate, result_of
from benchmarks.gpu_session import footprint
from benchmarks.gpu_session.footprint import CONTEXT, GIB, LIMIT
from benchmarks.gpu_session.stages import BUDGETS
from benchmarks.peers import Absent, peers
from benchmarks.peers.ours import edit as operator_of
from benchmarks.suites import suites
from benchmarks.suites.models import Twins, build, make_batch, training_step
from benchmarks.suites.op import Workload, copies, tensors

CPU = torch.device("cpu")
MODELS = ("step", "layer", "memory", "generate")


@pytest.mark.parametrize("name", BUDGETS)
def test_every_stage_stays_within_the_limit(name):
    assert CONTEXT <= footprint.stage(name) <= LIMIT == 24 * GIB


@pytest.mark.parametrize("name", [*MODELS, "serve"])
def test_a_whole_model_leaves_room_for_fragmentation(name):
    needed = footprint.serve if name == "serve" else footprint.step
    for case in suites()[name].cases("gpu"):
        assert footprint.weights(case) < needed(case) <= 22 * GIB, case


def test_hidden_of_the_operator_is_small():
    for case in [*suites()["op"].cases("gpu"), *sweep.cases("gpu")]:
        size = 4 if case.dtype == "fp32" else 2
        assert case.batch * case.sequence * case.dim * size <= 128 * 2**20, case
        assert 2 <= copies(case) <= 64


@pytest.mark.parametrize("case", [LLAMA_8B, suites()["step"].cases("gpu")[2]], ids=str)
def test_weights_are_those_of_the_model(case: ModelCase):
    model = build(case, torch.device("meta"))
    exact = sum(p.numel() * p.element_size() for p in model.parameters())
    assert footprint.weights(case) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_gate_stays_within_its_estimate(dtype):
    case = OpCase("all", 2, 256, 256, 8, dtype)
    elements = 2 * 256 * 256

    def check():
        edit = tensors(case, CPU)
        gate = OpGate(case, edit)
        operator = operator_of("auto", case, edit)
        workload = Workload(operator, edit.hidden, edit.upstream)
        return gate.check(result_of(*workload.result()), within_budget=True)

    assert check().passed
    peak = traffic(check, CPU).peak
    assert 50 * elements < peak <= footprint.gate(case) - CONTEXT


@pytest.mark.parametrize(
    "case",
    [
        llama("bf16", 256, 3, 2, 128, vocabulary=2048, dtype="bf16"),
        llama("fp32", 256, 3, 2, 128, vocabulary=512),
        llama("prompt", 256, 3, 2, 128, vocabulary=512, positions="prompt"),
        ModelCase("roberta", "roberta", 256, 3, 1024, 4, 4, 512, 4, 64, positions="f3", rank=1),
    ],
    ids=lambda case: case.name,
)
def test_a_step_stays_within_its_estimate(case):
    batch, twins = make_batch(case, CPU), Twins(case, CPU)
    peaks = []
    for peer in peers():
        if peer.name not in ("frozen", "ours", "reference", "LoRA") or peer.wrap is None:
            continue
        try:
            step = training_step(peer.wrap(twins.fresh(), case), batch)
        except Absent:
            continue
        step()
        peaks.append(traffic(step, CPU).peak)
    estimate = footprint.step(case) - CONTEXT - footprint.weights(case)
    assert estimate / 4 < max(peaks) <= estimate
