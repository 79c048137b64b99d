"""compare: noise, regressions, lost numbers, and results that cannot be compared."""

from __future__ import annotations

import math

import pytest
import typer
from sample_rows import MACHINE, row, write
from typer.testing import CliRunner

from benchmarks.compare import Change, compare_results, compare_rows, warnings

app = typer.Typer()
app.command()(compare_results)


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def cells(output):
    """The cells of all tables, a list per line."""
    lines = [line for line in output.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_rows_are_matched_by_key_and_sorted_by_ratio(tmp_path):
    before = write(
        tmp_path / "before.jsonl",
        row(case="a", value=1e-3),
        row(case="b", value=2e-3),
        row(case="c", value=4e-3, p20=3e-3, p80=5e-3),
    )
    after = write(
        tmp_path / "after.jsonl",
        row(case="c", value=4.4e-3),
        row(case="b", value=1e-3),
        row(case="a", value=1.5e-3),
    )
    done = call(before, after)
    assert done.exit_code == 0
    assert cells(done.output) == [
        ["a", "ours", "1.00 ms", "1.50 ms", "1.50×", "slower"],
        ["c", "ours", "4.00 ms", "4.40 ms", "1.10×", ""],
        ["b", "ours", "2.00 ms", "1.00 ms", "0.500×", "faster"],
    ]
    assert "3 in both results: 1 more, 1 less, 1 within the noise" in done.output


def test_a_table_for_each_metric_in_its_own_unit(tmp_path):
    sides = [
        write(
            tmp_path / f"{scale}.jsonl",
            row(metric="forward", value=scale * 1e-6),
            row(suite="memory", metric="peak", unit="bytes", value=scale * 1000),
        )
        for scale in (100, 300)
    ]
    done = call(*sides)
    assert [line.strip() for line in done.output.splitlines() if ":" in line][:2] == [
        "op: forward",
        "memory: peak",
    ]
    assert cells(done.output) == [
        ["a", "ours", "100 µs", "300 µs", "3.00×", "slower"],
        ["a", "ours", "100 kB", "300 kB", "3.00×", "more"],
    ]


@pytest.mark.parametrize(
    ("low", "high", "clear"),
    [(1.0, 1.1, True), (0.98, 1.1, False), (0.5, 0.8, True), (0.5, 0.95, False)],
)
def test_noise_is_where_the_ranges_overlap(low, high, clear):
    change = Change(
        row(value=0.93, p20=0.9, p80=0.99), row(value=(low + high) / 2, p20=low, p80=high)
    )
    assert change.clear is clear


@pytest.mark.parametrize(
    ("before", "after", "ratio"),
    [
        (0, 0, 1.0),
        (0, 40, math.inf),
        (5, 5, 1.0),
        (-8, 8, math.inf),
        (8, -8, -1.0),
        (0, -8, -math.inf),
    ],
)
def test_counts_may_start_at_zero(before, after, ratio):
    change = Change(row(unit="count", value=before), row(unit="count", value=after))
    assert change.ratio == ratio
    assert change.clear is (before != after)
    assert change.worse(1.05) is (after > before)


@pytest.mark.parametrize(
    ("peer", "after", "spread", "status"),
    [
        ("ours", 1.2, 0.01, 1),
        ("ours, untied", 1.2, 0.01, 1),
        ("pyreft", 1.2, 0.01, 0),  # another library
        ("ours", 1.2, 0.25, 0),  # within the noise
        ("ours", 1.04, 0.01, 0),  # clear, but below the threshold
        ("ours", 0.5, 0.01, 0),
    ],
)
def test_the_threshold_judges_this_library_beyond_its_noise(tmp_path, peer, after, spread, status):
    steady = row(case="steady")
    before = write(tmp_path / "before.jsonl", steady, row(peer=peer, value=1.0))
    changed = row(peer=peer, value=after, p20=after - spread, p80=after + spread)
    done = call(before, write(tmp_path / "after.jsonl", steady, changed), "--threshold", 1.05)
    assert done.exit_code == status
    says = f"error: 1 of this library's numbers are worse: op a forward {peer} 1.20×\n"
    assert done.stderr == (says if status else "")


def test_a_number_that_is_lost_is_worse_than_a_slow_one(tmp_path):
    before = write(tmp_path / "before.jsonl", row(), row(case="steady"))
    gone = row(value=None, absent="the gate did not pass")
    after = write(tmp_path / "after.jsonl", gone, row(case="steady"))
    done = call(before, after, "--threshold", 2)
    assert done.exit_code == 1
    assert "op a forward ours has no number any more: the gate did not pass" in done.stderr
    assert call(before, after).exit_code == 0


def test_a_threshold_over_nothing_does_not_pass(tmp_path):
    before = write(tmp_path / "before.jsonl", row(case="a"), row(case="p", peer="pyreft"))
    after = write(tmp_path / "after.jsonl", row(case="b"), row(case="p", peer="pyreft"))
    done = call(before, after, "--threshold", 1.05)
    assert done.exit_code == 2
    assert done.stderr == "error: --threshold: no number of this library is in both results\n"


def test_rows_of_only_one_result_are_listed_by_suite(tmp_path):
    before = write(tmp_path / "before.jsonl", row(case="a"), row(case="b"), row(suite="load"))
    after = write(tmp_path / "after.jsonl", row(case="a"), row(suite="step"))
    out = call(before, after).output
    assert "2 only before: op 1, load 1" in out
    assert "1 only after: step 1" in out
    comparison = compare_rows([row(value=None), row(case="b")], [row(), row(case="b")])
    sizes = (len(comparison.gained), len(comparison.lost), len(comparison.changes))
    assert sizes == (1, 0, 1)


def test_other_machines_and_versions_give_warnings(tmp_path):
    before = [row(), row(peer="pyreft", version="0.1.0")]
    elsewhere = MACHINE | {"device": "Fast GPU", "torch": "3.0", "commit": "another"}
    after = [row(machine=elsewhere), row(peer="pyreft", version="0.2.0", machine=elsewhere)]
    assert warnings(before, before) == []
    assert warnings(before, after) == [
        "device: Slow CPU before, Fast GPU after",
        "torch: 2.13.0 before, 3.0 after",
        "pyreft: 0.1.0 before, 0.2.0 after",
    ]
    done = call(write(tmp_path / "a.jsonl", *before), write(tmp_path / "b.jsonl", *after))
    assert done.exit_code == 0
    assert done.stderr.splitlines()[0] == "warning: device: Slow CPU before, Fast GPU after"


def test_results_that_cannot_be_compared_give_a_single_line(tmp_path):
    for device in ("cpu", "h200"):
        (tmp_path / device).mkdir()
        write(tmp_path / device / "op.jsonl", row())
    folder = tmp_path / "cpu"
    assert call(folder, folder).exit_code == 0
    for other, says in (
        (tmp_path, "two results for op / a / forward / ours: give the folder of one device"),
        (
            tmp_path / "none",
            f"no results at {tmp_path / 'none'}: a .jsonl file or a folder with some",
        ),
    ):
        done = call(folder, other)
        assert (done.exit_code, done.stderr) == (2, f"error: {says}\n")
