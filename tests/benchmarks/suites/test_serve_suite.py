"""The serving suite on a tiny model."""

from __future__ import annotations

import pytest
import torch

from benchmarks.peers import Peer, Wrapped, peers
from benchmarks.suites import Options
from benchmarks.suites import serve as suite
from benchmarks.suites.serve import SUITE, adapter_counts, adapter_names
from benchmarks.timing import Effort


@pytest.fixture
def rows(measured):
    """The rows of the suite."""
    return measured("serve")


def test_adapters_are_mixed_evenly():
    case = SUITE.cases("cpu")[0]
    assert case.batch == 512 and adapter_counts(case, (0, 8, 600)) == [0, 8]
    assert adapter_names(case, 0) == ["__base__"] * 512
    mixed = adapter_names(case, 64)
    assert len(set(mixed)) == 64 and mixed.count("user3") == 8 and mixed[0] != mixed[1]


def test_every_peer_and_every_number_of_adapters_has_rows(rows):
    present = {
        (row.peer, row.shape["adapters"], row.metric) for row in rows if row.value is not None
    }
    for metric in ("prefill", "decode"):
        ours = {("ours", number, metric) for number in (0, 1, 8)}
        assert {("base", 0, metric)} | ours <= present
        assert ("ours", 8, f"{metric}_over_one") in present
    case = SUITE.cases("ci")[0]
    for metric in ("memory", "host_memory"):
        (memory,) = [row for row in rows if row.metric == metric]
        assert memory.value == case.layers * (2 * case.hidden + 1) * case.rank * 4
    assert all(row.gate is not None and row.gate.passed for row in rows if row.metric == "prefill"
               and row.peer == "ours")  # fmt: skip


def test_operators_do_not_grow_with_adapters_and_decoding_adds_none(rows):
    """Counts are exact on any machine, unlike times."""
    counts = {
        (row.shape["adapters"], row.metric): row.value for row in rows if row.unit == "count"
    }  # fmt: skip
    assert {counts[number, "decode_operations"] for number in (0, 1, 8)} == {0}
    assert counts[8, "prefill_operations"] == counts[1, "prefill_operations"] > 0
    assert counts[0, "prefill_operations"] == 0


def test_left_out_numbers_of_adapters_have_a_reason(monkeypatch):
    monkeypatch.setitem(suite.LORA_MOST, "cpu", 1)
    (case,) = SUITE.cases("ci")
    lora = [peer for peer in peers() if peer.name == "LoRA"]
    options = Options(torch.device("cpu"), lora, Effort(0, min_rounds=1, warmup=0))
    prefill = {
        row.shape["adapters"]: row
        for row in SUITE.run(case, options)
        if row.metric == "prefill"
    }  # fmt: skip
    assert prefill[1].value is not None
    assert prefill[8].value is None and "more than 1 adapters" in prefill[8].absent


def test_the_time_of_a_pyreft_request_is_multiplied_by_their_number(monkeypatch):
    sizes = []

    def wrap(base, case):
        return Wrapped(None, [], base, lambda ids, count: sizes.append((len(ids), count)))

    def clock(device):
        return lambda **steps: {name: step() or 0.25 for name, step in steps.items()}

    monkeypatch.setattr(suite, "Clock", clock)
    (case,) = SUITE.cases("ci")
    options = Options(
        torch.device("cpu"), [Peer("pyreft", wrap=wrap)], Effort(0, min_rounds=1, warmup=0)
    )
    (row,) = SUITE.run(case, options)
    assert (row.metric, row.value) == ("prefill", 0.25 * case.batch)
    assert set(sizes) == {(1, 1)} and "times their number" in row.note


def test_a_wrong_edit_leaves_no_number(monkeypatch):
    """The gate compares sequences of the mixed batch with each adapter alone."""
    from reft.adapter.device_cache import AdapterCache

    insert = AdapterCache.insert
    monkeypatch.setattr(AdapterCache, "insert", lambda self, items: insert(self, items)[::-1])
    (case,) = SUITE.cases("ci")
    ours = [peer for peer in peers() if peer.name == "ours"]
    options = Options(torch.device("cpu"), ours, Effort(0.1, min_rounds=2, warmup=1))
    rows = list(SUITE.run(case, options))
    assert rows and all(row.value is None and not row.gate.passed for row in rows)
