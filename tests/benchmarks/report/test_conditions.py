"""The sentence about machines and commits."""

from __future__ import annotations

from sample_rows import MACHINE, MODEL, row

from benchmarks.report.conditions import measured_on
from benchmarks.report.device_report import render_report


def test_two_machines_have_a_sentence_each():
    later = MACHINE | {
        "commit": "ba9876543210+",
        "device": "Fast GPU",
        "driver": "580",
        "threads": 4,
    }
    text = render_report([row(), row(suite="load", metric="wrap", shape=MODEL, machine=later)])
    lines = [line for line in text.splitlines() if line.startswith("Measured")]
    assert lines[0].startswith("Measured (op) on Slow CPU, 1 thread of 2 cores, torch")
    assert lines[1].startswith("Measured (load) on Fast GPU, driver 580, 4 threads of 2 cores,")
    assert lines[1].endswith("commit ba9876543210 with uncommitted changes; 2026-02-03.")


def test_two_commits_on_a_machine_are_one_sentence():
    later = MACHINE | {"commit": "ba9876543210"}
    rows = [row(), row(suite="load", metric="wrap", shape=MODEL, machine=later)]
    (sentence,) = measured_on(rows)
    assert sentence.count("Slow CPU") == 1
    assert ", commits 0123456789ab (op) and ba9876543210 (load); 2026" in sentence
    steps = [row(), row(peer="pyreft", machine=later)]
    assert ", commits 0123456789ab and ba9876543210; 2026" in measured_on(steps)[0]
