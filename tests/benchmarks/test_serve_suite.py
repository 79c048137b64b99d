"""The serving suite on a tiny model, its table and its plot."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import serving_page
from benchmarks.machine import ROOT
from benchmarks.peers import peers
from benchmarks.records import read
from benchmarks.report import machine_lines
from benchmarks.suites import Options
from benchmarks.suites.serve import SUITE, counts, names
from benchmarks.timing import Effort


@pytest.fixture(scope="module")
def rows():
    (case,) = SUITE.cases("ci")
    options = Options(torch.device("cpu"), peers(), Effort(0.1, min_rounds=2, warmup=1))
    return list(SUITE.run(case, options))


def test_adapters_are_mixed_evenly():
    case = SUITE.cases("cpu")[0]
    assert case.batch == 512 and counts(case, (0, 8, 600)) == [0, 8]
    assert names(case, 0) == ["__base__"] * 512
    mixed = names(case, 64)
    assert len(set(mixed)) == 64 and mixed.count("user3") == 8 and mixed[0] != mixed[1]


def test_every_peer_and_every_number_of_adapters_has_rows(rows):
    found = {(row.peer, row.shape["adapters"], row.metric) for row in rows if row.value is not None}
    for metric in ("prefill", "decode"):
        assert {("base", 0, metric), ("ours", 1, metric), ("ours", 8, metric)} <= found
        assert ("ours", 8, f"{metric}_over_one") in found
    (memory,) = [row for row in rows if row.metric == "memory"]
    case = SUITE.cases("ci")[0]
    assert memory.value == case.layers * (2 * case.hidden + 1) * case.rank * 4
    assert all(row.gate is not None and row.gate.passed for row in rows if row.metric == "prefill"
               and row.peer == "ours")  # fmt: skip


def test_a_wrong_edit_is_no_number(monkeypatch):
    """The gate compares sequences of the mixed batch with their adapter alone."""
    from reft.serving.tables import Tables

    admit = Tables.admit
    monkeypatch.setattr(Tables, "admit", lambda self, wanted: admit(self, wanted)[::-1])
    (case,) = SUITE.cases("ci")
    ours = [peer for peer in peers() if peer.name == "ours"]
    options = Options(torch.device("cpu"), ours, Effort(0.1, min_rounds=2, warmup=1))
    found = list(SUITE.run(case, options))
    assert found and all(row.value is None and not row.gate.passed for row in found)


def test_the_page_is_filled(rows, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{serving_page.BEGIN}\nold\n{serving_page.END}\nbelow\n")
    more = [dataclasses.replace(row, shape={**row.shape, "rank": 16}) for row in rows]
    serving_page.write_page([*rows, *more], ["Measured here."], page)
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert "| ours | f3+l3 | 2 | 8 |" in text and "| LoRA | f3+l3 | 2 | 1 |" in text
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")
    page.write_text("nothing")
    with pytest.raises(ValueError, match="needs the lines"):
        serving_page.write_page(rows, [], page)
    with pytest.raises(ValueError, match="no rows of it"):
        serving_page.table([], [])


def test_the_page_says_what_the_rows_say():
    rows = [row for row in read(ROOT / "benchmarks" / "results" / "cpu") if row.suite == "serve"]
    assert serving_page.table(rows, machine_lines(rows)) in serving_page.PAGE.read_text()
