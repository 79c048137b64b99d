"""The visit: shares of time, stages that fail or run out of it, a real stage without a GPU."""

from __future__ import annotations

import json
import os
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.gpu import Stage, run_stages, stages
from benchmarks.records import read
from benchmarks.suites import suites

PASSES = ("-c", "print('fine')")
FAILS = ("-c", "raise SystemExit('broken')")
SLEEPS = ("-c", "import time; print('begun', flush=True); time.sleep(60)")


def visit(tmp_path, wanted, budget=20.0, words=None):
    console = Console(file=(tmp_path / "printed").open("w"))
    return run_stages(wanted, words or {}, budget, tmp_path, os.environ, console)


def test_every_suite_is_visited_and_parity_comes_first():
    names = [stage.name for stage in stages(tiny=False)]
    assert names[0] == "parity" and names[-1] == "report"
    assert set(suites()) <= set(names)
    assert [stage.name for stage in stages(tiny=True)] == names
    assert sum(stage.share for stage in stages(tiny=False)) <= 540


def test_stages_end_as_they_ended(tmp_path):
    outcomes = visit(tmp_path, [Stage("a", PASSES, 1), Stage("b", FAILS, 1), Stage("c", PASSES, 1)])
    assert [(one.stage, one.ended) for one in outcomes] == [
        ("a", "passed"),
        ("b", "failed"),
        ("c", "passed"),
    ]
    assert [one.last_line for one in outcomes] == ["fine", "broken", "fine"]
    assert (tmp_path / "b.log").read_text() == "broken\n"


def test_nothing_is_measured_after_failed_parity(tmp_path):
    outcomes = visit(tmp_path, [Stage("parity", FAILS, 1, essential=True), Stage("op", PASSES, 1)])
    assert [one.stage for one in outcomes] == ["parity"]


def test_a_stage_that_is_out_of_time_is_stopped_and_the_rest_goes_on(tmp_path):
    outcomes = visit(tmp_path, [Stage("slow", SLEEPS, 1), Stage("next", PASSES, 3)], budget=8.0)
    slow, following = outcomes
    assert (slow.ended, slow.last_line) == ("stopped", "begun") and slow.seconds < 6
    assert following.ended == "passed"


def test_time_left_over_goes_to_those_behind(tmp_path):
    show = ("-c", "import sys; print(sys.argv[1])", "{seconds}")
    outcomes = visit(tmp_path, [Stage("a", PASSES, 1), Stage("b", show, 1)], budget=100.0)
    assert 80 <= float(outcomes[1].last_line) <= 90  # 0.9 of nearly everything, not of the half


def test_a_tiny_visit_of_one_stage(tmp_path):
    done = CliRunner().invoke(
        app,
        ["gpu", "--tiny", "--stage", "orthonormal", "--output", str(tmp_path), "--budget", "60"],
    )
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "visit.json").read_text())
    assert [(one["stage"], one["ended"]) for one in report["stages"]] == [("orthonormal", "passed")]
    assert report["tiny"] and report["machine"]["python"] == sys.version.split()[0]
    assert {row.suite for row in read(tmp_path)} == {"orthonormal"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tiny", "--stage", "nothing"], "--stage must be one of parity, sweep"),
        (["--tiny"], "--tiny needs --output"),
        ([], "no CUDA device; --tiny tries everything"),
    ],
)
def test_bad_calls_are_one_line(arguments, says):
    import torch

    if not arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = CliRunner().invoke(app, ["gpu", *arguments])
    assert done.exit_code == 2 and says in done.stderr
