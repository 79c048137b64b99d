"""Small sizes of the operator and the orthonormal map, timed by pytest-benchmark.

``pytest tests/benchmarks/test_speed.py --benchmark-only -p no:xdist`` prints the table. With xdist
each benchmark runs once, and only its gate is tested.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gate import OpGate, result_of
from benchmarks.peers import Absent, peers
from benchmarks.suites import suites
from benchmarks.suites.op import Workload, tensors
from benchmarks.suites.orthonormal import check_orthonormal

CPU = torch.device("cpu")
EDITING = [peer for peer in peers() if peer.edit is not None and "compiled" not in peer.name]
ROTATING = [peer for peer in peers() if peer.rotation is not None]


def built(builder, *arguments):
    try:
        return builder(*arguments)
    except Absent as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("case", suites()["op"].cases("ci"), ids=str)
@pytest.mark.parametrize("peer", EDITING, ids=lambda peer: peer.name)
def test_edit(benchmark, peer, case, phase):
    benchmark.group = f"op {phase} {case}"
    edit = tensors(case, CPU)
    operator = built(peer.edit, case, edit)
    workload = Workload(operator, edit.hidden, edit.upstream)
    result = result_of(*workload.result())
    gate = OpGate(case, edit).check(result, within_budget=operator.within_budget)
    assert gate.passed, gate.says

    def before():
        if phase == "backward":
            workload.forward()
            workload.feed()

    benchmark.pedantic(getattr(workload, phase), setup=before, rounds=30, warmup_rounds=3)


@pytest.mark.parametrize("case", suites()["orthonormal"].cases("ci"), ids=str)
@pytest.mark.parametrize("peer", ROTATING, ids=lambda peer: peer.name)
def test_orthonormal(benchmark, peer, case):
    benchmark.group = f"orthonormal {case}"
    rotation = built(peer.rotation, case, CPU)
    gate = check_orthonormal(rotation.call())
    assert gate.passed, gate.says
    upstream = [torch.randn_like(matrix) for matrix in rotation.call()]
    benchmark.pedantic(
        lambda: torch.autograd.grad(rotation.call(), rotation.leaves, upstream),
        rounds=30,
        warmup_rounds=3,
    )
