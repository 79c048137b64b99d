"""Every suite at its smallest size, and properties of this library's rows."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import suppress

import pytest
import torch

from benchmarks.peers import Absent, Operator, ours, peers, pyreft
from benchmarks.suites import Options, suites
from benchmarks.suites import models as models_suite
from benchmarks.suites.op import graphs_of, tensors
from benchmarks.timing import Effort

METRICS = {
    "op": {"forward", "backward"},
    "orthonormal": {"forward+backward", "buffers"},
    "layer": {"step", "op_overhead"},
    "step": {"step", "op_overhead"},
    "memory": {"peak", "saved"},
    "generate": {"prefill", "decode", "decode_operations", "decode_bytes"},
    "load": {"wrap", "save", "load"},
}


@pytest.mark.parametrize("name", METRICS)
def test_every_row_has_a_number_or_a_reason(measured, name):
    rows = measured(name)
    assert {row.metric for row in rows} == METRICS[name]
    for row in rows:
        assert (row.value is None) == (row.absent is not None), row
        assert row.machine["torch"] == torch.__version__ and row.machine["commit"]
        if row.gate is not None:
            assert row.gate.passed, row
        if row.value is not None and row.unit == "s":
            assert row.value > 0 and row.rounds >= (1 if row.metric == "op_overhead" else 2)
    ours = [row for row in rows if row.peer == "ours"]
    assert {row.metric for row in ours} == METRICS[name]
    assert all(row.value is not None for row in ours)
    if name not in ("orthonormal", "load"):
        assert all(row.gate is not None for row in ours)


def test_the_baseline_has_ratio_one_and_is_measured_twice(measured):
    rows = {row.peer: row for row in measured("step")}
    assert rows["frozen"].ratio == 1.0
    assert rows["frozen again"].ratio != 1.0
    assert rows["ours"].baseline == "frozen" and rows["ours, untied"].value is not None


def test_shares_of_bandwidth_are_of_this_run(measured):
    for row in measured("op"):
        if row.value is not None:
            assert row.share == pytest.approx(row.bytes / row.value / row.bandwidth)


def test_decoding_adds_no_operators_and_no_bytes(measured):
    rows = {(row.metric, row.peer): row.value for row in measured("generate")}
    assert rows["decode_operations", "ours"] == 0
    assert rows["decode_bytes", "ours"] == 0


def test_saved_bytes_are_those_of_the_edited_rows(measured):
    suite = suites()["memory"]
    (case,) = suite.cases("ci")
    rows, rank, dim = case.batch * 6, case.rank, case.hidden
    layer = rows * dim + rows * rank  # the rows before the edit, and their coefficients
    weights = 2 * (2 * rank) * dim + (2 * rank) ** 2 + 2 * rank * rank  # A, R, V, V₀, S, P at most
    saved = {row.peer: row.value for row in measured("memory") if row.metric == "saved"}
    assert saved["ours"] <= 4 * case.layers * (layer + 2 * weights)
    assert saved["ours"] < 4 * case.layers * case.batch * case.sequence * dim, "the size of hidden"


def test_no_buffer_is_square(measured):
    suite = suites()["orthonormal"]
    (case,) = suite.cases("ci")
    buffers = {row.peer: row.value for row in measured("orthonormal") if row.metric == "buffers"}
    assert buffers["ours"] == 4 * case.layers * case.dim * case.rank


def test_an_absent_peer_gives_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyreft", None)
    peer = next(peer for peer in peers() if peer.name == "pyreft")
    suite = suites()["op"]
    case = suite.cases("ci")[0]
    rows = list(suite.run(case, Options(torch.device("cpu"), [peer], Effort(0, 1, 1))))
    assert {row.metric for row in rows} == {"forward", "backward"}
    assert all("pyreft is not installed" in row.absent and row.value is None for row in rows)
    with pytest.raises(Absent, match=r"benchmarks/README\.md"):
        pyreft.wrap(True, None, None)


def test_peers_that_synchronise_are_not_capturable():
    device = torch.device("cpu")
    case = suites()["op"].cases("ci")[0]
    edit = tensors(case, device)
    capturable = {}
    for peer in peers():
        if peer.edit is not None:
            with suppress(Absent):
                capturable[peer.name] = peer.edit(case, edit).capturable
    assert capturable["ours"] and not capturable["reference"]
    assert capturable.get("reference, compiled", True) and not capturable.get("pyreft", False)
    with pytest.raises(RuntimeError, match="synchronises with the device"):
        graphs_of(case, Operator(lambda hidden: hidden, {}, capturable=False), edit)


def test_a_failed_gate_leaves_no_number(monkeypatch):
    by_name = {peer.name: peer for peer in peers()}
    real = by_name["ours"].edit

    def wrong(case, edit):
        operator = real(case, edit)
        return dataclasses.replace(operator, call=lambda hidden: operator.call(hidden) * 1.01)

    suite = suites()["op"]
    broken = dataclasses.replace(by_name["ours"], edit=wrong)
    options = Options(torch.device("cpu"), [broken, by_name["reference"]], Effort(0, 1, 1))
    rows = list(suite.run(suite.cases("ci")[0], options))
    ours = [row for row in rows if row.peer == "ours"]
    assert len(ours) == 2
    assert all(row.value is None and not row.gate.passed for row in ours)
    assert all(row.absent == "the gate did not pass" for row in ours)
    assert all(row.value is not None for row in rows if row.peer == "reference")


def test_the_gate_of_models_rejects_a_wrong_edit(monkeypatch):
    (case,) = suites()["step"].cases("ci")
    device = torch.device("cpu")
    twins, batch = models_suite.Twins(case, device), models_suite.make_batch(case, device)
    assert models_suite.check(case, twins, batch).passed
    assert models_suite.check(case, twins, batch, tied=False).passed
    other = case.but(positions="f3+l2")
    monkeypatch.setattr(
        models_suite, "wrap_ours", lambda tied, base, case: ours.wrap(tied, base, other)
    )
    assert not models_suite.check(case, twins, batch).passed


def test_twins_share_weights_and_nothing_else():
    (case,) = suites()["step"].cases("ci")
    twins = models_suite.Twins(case, torch.device("cpu"))
    first, second = twins.fresh(), twins.fresh()
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    first.model.layers[0].register_forward_hook(lambda *args: None)
    assert not second.model.layers[0]._forward_hooks
