"""The operator and the orthonormal map in small sizes, timed by pytest-benchmark.

``pytest tests/benchmarks/test_speed.py --benchmark-only -p no:xdist`` prints the table; among many
workers each runs once, and its gate is what is tested.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gate import OpGate, result_of
from benchmarks.peers import Absent, peers
from benchmarks.suites import suites
from benchmarks.suites.op import Stand, tensors
from benchmarks.suites.orthonormal import check_rotation

CPU = torch.device("cpu")
EDITING = [one for one in peers() if one.edit is not None and "compiled" not in one.name]
ROTATING = [one for one in peers() if one.rotation is not None]


def built(builder, *arguments):
    try:
        return builder(*arguments)
    except Absent as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("case", suites()["op"].cases("ci"), ids=str)
@pytest.mark.parametrize("peer", EDITING, ids=lambda one: one.name)
def test_edit(benchmark, peer, case, phase):
    benchmark.group = f"op {phase} {case}"
    edit = tensors(case, CPU)
    operator = built(peer.edit, case, edit)
    stand = Stand(operator, edit.hidden, edit.upstream)
    gate = OpGate(case, edit).check(result_of(*stand.result()), own=operator.own)
    assert gate.passed, gate.says

    def before():
        if phase == "backward":
            stand.forward()
            stand.feed()

    benchmark.pedantic(getattr(stand, phase), setup=before, rounds=30, warmup_rounds=3)


@pytest.mark.parametrize("case", suites()["orthonormal"].cases("ci"), ids=str)
@pytest.mark.parametrize("peer", ROTATING, ids=lambda one: one.name)
def test_orthonormal(benchmark, peer, case):
    benchmark.group = f"orthonormal {case}"
    rotation = built(peer.rotation, case, CPU)
    gate = check_rotation(rotation.call())
    assert gate.passed, gate.says
    upstream = [torch.randn_like(one) for one in rotation.call()]
    benchmark.pedantic(
        lambda: torch.autograd.grad(rotation.call(), rotation.leaves, upstream),
        rounds=30,
        warmup_rounds=3,
    )
