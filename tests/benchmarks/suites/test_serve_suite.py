"""The serving suite on a tiny model, its table and its plot."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.machine import ROOT
from benchmarks.peers import Peer, Wrapped, peers
from benchmarks.report import serving_table
from benchmarks.report.device_report import machine_lines
from benchmarks.report.plots.serve import adapters
from benchmarks.result_rows import read
from benchmarks.suites import Options
from benchmarks.suites import serve as suite
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
        ours = {("ours", number, metric) for number in (0, 1, 8)}
        assert {("base", 0, metric)} | ours <= found
        assert ("ours", 8, f"{metric}_over_one") in found
    case = SUITE.cases("ci")[0]
    for metric in ("memory", "host_memory"):
        (memory,) = [row for row in rows if row.metric == metric]
        assert memory.value == case.layers * (2 * case.hidden + 1) * case.rank * 4
    assert all(row.gate is not None and row.gate.passed for row in rows if row.metric == "prefill"
               and row.peer == "ours")  # fmt: skip


def test_operators_do_not_grow_with_adapters_and_decoding_has_none(rows):
    """Exact on any machine: what times say only as far as it is quiet."""
    found = {
        (row.shape["adapters"], row.metric): row.value for row in rows if row.unit == "count"
    }  # fmt: skip
    assert {found[number, "decode_operations"] for number in (0, 1, 8)} == {0}
    assert found[8, "prefill_operations"] == found[1, "prefill_operations"] > 0
    assert found[0, "prefill_operations"] == 0


def test_peers_of_which_some_was_left_out_say_so(monkeypatch):
    monkeypatch.setitem(suite.LORA_MOST, "cpu", 1)
    (case,) = SUITE.cases("ci")
    lora = [peer for peer in peers() if peer.name == "LoRA"]
    options = Options(torch.device("cpu"), lora, Effort(0, min_rounds=1, warmup=0))
    found = {
        row.shape["adapters"]: row
        for row in SUITE.run(case, options)
        if row.metric == "prefill"
    }  # fmt: skip
    assert found[1].value is not None
    assert found[8].value is None and "more than 1 adapters" in found[8].absent


def test_a_request_of_pyreft_counts_as_often_as_there_are_sequences(monkeypatch):
    """The time of one, a batch of one, times their number; and the row says so."""
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
    (one,) = SUITE.run(case, options)
    assert (one.metric, one.value) == ("prefill", 0.25 * case.batch)
    assert set(sizes) == {(1, 1)} and "times their number" in one.note


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
    page.write_text(f"above\n{serving_table.BEGIN}\nold\n{serving_table.END}\nbelow\n")
    more = [dataclasses.replace(row, shape={**row.shape, "rank": 16}) for row in rows]
    serving_table.write_page([*rows, *more], ["Measured here."], page)
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert "| ours | f3+l3 | 2 | 8 |" in text and "| LoRA | f3+l3 | 2 | 1 |" in text
    (case,) = SUITE.cases("ci")
    bytes_each = f"{case.layers * (2 * case.hidden + 1) * case.rank * 4:,}"
    assert f"| f3+l3 | 2 | {bytes_each} | {bytes_each} | {bytes_each} |" in text
    assert "pyreft: one request after another" in text and "vLLM has no line" in text
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")
    page.write_text("nothing")
    with pytest.raises(ValueError, match="needs the lines"):
        serving_table.write_page(rows, [], page)
    with pytest.raises(ValueError, match="no rows of it"):
        serving_table.table([], [])


def test_a_line_of_the_page_is_its_rows(rows):
    """Ratio to the base, ratio to one adapter, operators: each from the row of that name."""
    values = {
        "prefill": (0.5, 1.5), "decode": (0.05, 1.25), "prefill_over_one": (1.75, None),
        "decode_over_one": (1.875, None), "decode_operations": (3.0, None),
        "prefill_counted": (0.25, 1.125),
        "decode_counted": (0.03, 1.0625),
    }  # fmt: skip
    changed = [
        dataclasses.replace(row, value=values[row.metric][0], ratio=values[row.metric][1])
        for row in rows
        if row.peer == "ours" and row.shape["adapters"] == 8 and row.metric in values
    ]
    one = [
        dataclasses.replace(row, value=0.2)
        for row in rows
        if row.peer == "ours" and row.shape["adapters"] == 1 and row.metric == "prefill_counted"
    ]
    base = [row for row in rows if row.peer == "base"]
    text = serving_table.table([*base, *one, *changed], ["Measured here."])
    line = "| ours | f3+l3 | 2 | 8 | 1.125 | 1.250 | 1.50 | 1.75 | 3 | 1.062 | 1.25 | 1.88 |"
    assert line in text


def test_the_page_says_how_large_the_noise_is(rows):
    """The range of what no adapter takes, of the rows at hand; without them, no word of it."""
    again = [row for row in rows if row.peer == "ours" and row.shape["adapters"] == 0]
    kept = [row for row in rows if row not in again]
    changed = [
        dataclasses.replace(row, ratio={"prefill": 0.875, "decode": 1.25}[row.metric])
        for row in again
        if row.metric in ("prefill", "decode")
    ]
    assert "the noise: 0.88 to 1.25. " in serving_table.table([*kept, *changed], [])
    assert "noise" not in serving_table.table(kept, [])


def test_the_plot_says_what_was_counted(rows):
    figure = adapters([row for row in rows if row.ratio is not None])
    assert any("ours counted" in one.get_text() for one in figure.texts)
    timed = [row for row in rows if row.ratio is not None and "counted" not in row.metric]
    figure = adapters(timed)
    assert any("ours timed, LoRA timed" in one.get_text() for one in figure.texts)


def test_the_page_says_what_the_rows_say():
    rows = [row for row in read(ROOT / "benchmarks" / "results" / "cpu") if row.suite == "serve"]
    assert serving_table.table(rows, machine_lines(rows)) in serving_table.PAGE.read_text()
