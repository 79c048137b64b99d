"""Row files: round trip, the latest row counts, and a run replaces its suites."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks.result_rows import Gate, Row, Writer, parse, read
from benchmarks.timing import Quantiles


def row(**changes):
    plain = Row(
        suite="op",
        case="a",
        metric="forward",
        shape={"dim": 8},
        peer="ours",
        version=None,
        unit="s",
        value=2.0,
        gate=Gate(True, "fine"),
        machine={"device": "here"},
    )
    return dataclasses.replace(plain, **changes)


def test_round_trip():
    written = row(bytes=100, bandwidth=200.0, note="n", baseline="ours").timed(
        Quantiles(2.0, 1.0, 3.0, 7), Quantiles(1.5, 1.4, 1.6, 7)
    )
    assert parse(written.as_json()) == written
    assert (written.value, written.p20, written.p80, written.rounds) == (2.0, 1.0, 3.0, 7)
    assert (written.ratio, written.ratio_p20, written.ratio_p80) == (1.5, 1.4, 1.6)
    assert written.share == 100 / 2.0 / 200.0
    assert row(unit="bytes", bytes=1, bandwidth=1.0).share is None


@pytest.mark.parametrize(
    "line", ["[]", '{"suite": "op"}', json.dumps(json.loads(row().as_json()) | {"format": 99})]
)
def test_other_lines_are_refused(line):
    with pytest.raises(ValueError, match="not a result of format 1"):
        parse(line)


def test_run_replaces_its_own_suites_and_no_others(tmp_path):
    list(Writer(tmp_path).write([row(value=1.0), row(suite="step", value=5.0)]))
    list(Writer(tmp_path).write([row(value=2.0), row(value=3.0), row(metric="backward")]))
    values = {each.key: each.value for each in read(tmp_path)}
    assert values == {
        ("op", "a", "forward", "ours"): 3.0,  # the later of two
        ("op", "a", "backward", "ours"): 2.0,
        ("step", "a", "forward", "ours"): 5.0,
    }


def test_unreadable_results_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results at"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no results at .*gone\.jsonl"):
        read(tmp_path / "gone.jsonl")
    file = tmp_path / "op.jsonl"
    file.write_text(row().as_json() + "\n{nonsense\n")
    with pytest.raises(ValueError, match=r"op\.jsonl, line 2"):
        read(file)


def test_rounds_become_quantiles_and_paired_ratios():
    # The second round was slow for both sides: the ratio does not change.
    timed = row().with_rounds([2.0, 20.0, 4.0], [1.0, 10.0, 2.0])
    assert (timed.value, timed.rounds, timed.ratio) == (4.0, 3, 2.0)
    assert row().with_rounds([2.0], None).ratio is None
