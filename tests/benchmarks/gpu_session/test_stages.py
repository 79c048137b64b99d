"""Stages of a session: budgets, and failures that do not stop the next stages."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.gpu_session import stages as module
from benchmarks.gpu_session.stages import BUDGETS, SECONDS, Stage, run_stages, stages
from benchmarks.suites import suites

PASSES = ("-c", "print('fine')")
FAILS = ("-c", "raise SystemExit('broken')")
SLEEPS = ("-c", "import time; print('begun', flush=True); time.sleep(60)")
# A child in the process group of the stage; it prints its id and outlives its parent.
_FORKS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
_INTERRUPTED = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("so far 3 failed")
"""
FORKS, INTERRUPTED = ("-c", _FORKS), ("-c", _INTERRUPTED)


def run(tmp_path, selected, budget=20.0, report=lambda outcomes, running: None):
    return run_stages(selected, budget, tmp_path, os.environ, report)


def test_every_suite_has_a_stage_and_all_fit_a_session():
    names = [stage.name for stage in stages(tiny=False)]
    assert names == list(BUDGETS) == [stage.name for stage in stages(tiny=True)]
    assert names[:4] == ["parity", "op", "step", "sweep"] and names[-1] == "report"
    assert set(suites()) <= set(names)
    assert sum(BUDGETS.values()) <= 540


def test_parity_runs_all_kernel_tests_except_the_large_ones():
    by_name = {stage.name: stage.command for stage in stages(tiny=False)}
    parity = by_name["parity"]
    assert "tests/kernels" in parity and parity[parity.index("-n") + 1] == "12"
    assert parity[parity.index("--deselect") + 1] in by_name["offsets"]
    assert parity[parity.index("--device") + 1] == "cuda"


def test_a_failed_stage_stops_nothing(tmp_path):
    outcomes = run(tmp_path, [Stage("a", PASSES, 1), Stage("b", FAILS, 1), Stage("c", PASSES, 1)])
    assert [(outcome.stage, outcome.ended) for outcome in outcomes] == [
        ("a", "passed"),
        ("b", "failed"),
        ("c", "passed"),
    ]
    assert [outcome.last_line for outcome in outcomes] == ["fine", "broken", "fine"]
    assert (tmp_path / "b.log").read_text() == "broken\n"


def test_a_stage_out_of_time_is_killed_and_the_next_runs(tmp_path):
    outcomes = run(tmp_path, [Stage("slow", SLEEPS, 1), Stage("next", PASSES, 3)], budget=8.0)
    slow, following = outcomes
    assert (slow.ended, slow.last_line) == ("stopped", "begun") and slow.seconds < 6
    assert following.ended == "passed"


def test_children_of_a_stage_are_killed_with_it(tmp_path):
    (outcome,) = run(tmp_path, [Stage("forks", FORKS, 1)], budget=3.0)
    assert outcome.ended == "stopped"
    assert _is_gone(int(outcome.last_line))


def _is_gone(pid):
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            if state == "Z":  # dead, not yet reaped
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_stage_with_grace_prints_its_results_so_far(tmp_path):
    (outcome,) = run(tmp_path, [Stage("tests", INTERRUPTED, 1, grace=8.0)], budget=12.0)
    assert (outcome.ended, outcome.last_line) == ("stopped", "so far 3 failed")
    assert outcome.seconds < 11


def test_each_stage_gets_its_budget_and_unused_seconds(tmp_path):
    show = ("-c", "import sys; print(sys.argv[1])", SECONDS)
    outcomes = run(tmp_path, [Stage("a", show, 40), Stage("b", show, 60)], budget=100.0)
    assert float(outcomes[0].last_line) == 36  # 0.9 of its share
    assert 80 <= float(outcomes[1].last_line) <= 90  # 0.9 of nearly the whole budget


def test_a_running_stage_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "REPORT_EVERY", 0.1)
    seen = []

    def report(outcomes, running):
        seen.append((len(outcomes), running))

    run(tmp_path, [Stage("a", ("-c", "import time; time.sleep(1)"), 1)], report=report)
    assert seen[0] == (0, "a") and seen[-1] == (1, None)
    assert seen.count((0, "a")) >= 3


@pytest.mark.parametrize("tiny", [True, False])
def test_placeholders_of_commands_are_known(tiny):
    for stage in stages(tiny):
        for word in stage.command:
            assert not word.startswith("{") or word in (module.OUTPUT, SECONDS)
