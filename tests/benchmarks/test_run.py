"""The commands run and list: rows, failures, compiling ahead, and errors."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import run
from benchmarks.__main__ import app
from benchmarks.result_rows import read
from benchmarks.suites import suites


def call(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments)])


def test_list_names_every_suite_and_peer():
    done = call("list")
    assert done.exit_code == 0
    for name in ("op", "orthonormal", "layer", "step", "memory", "generate", "load"):
        assert name in done.output
    for name in ("ours", "pyreft", "adapters", "LoRA", "reference, compiled", "frozen"):
        assert name in done.output


def test_run_writes_rows(tmp_path):
    done = call(
        "run", "op", "--size", "ci", "--peer", "ours", "--peer", "reference", "--seconds", 0,
        "--rounds", 1, "--device", "cpu", "--match", "f7+l7", "--output", tmp_path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = read(tmp_path / "op.jsonl")
    assert {(row.peer, row.metric) for row in rows} == {
        (peer, metric) for peer in ("ours", "reference") for metric in ("forward", "backward")
    }
    assert "written to" in done.output and "× ours" in done.output


def test_cases_are_compiled_ahead_in_separate_processes(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "_warm", lambda *arguments: seen.append(arguments))
    done = call(
        "run", "op", "orthonormal", "--size", "ci", "--peer", "ours", "--seconds", 0,
        "--rounds", 1, "--device", "cpu", "--jobs", 2, "--output", tmp_path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    ((suite, cases, device, names),) = seen
    assert (suite, len(cases), device.type, names) == ("op", 2, "cpu", ["ours"])
    monkeypatch.undo()
    run._warm(suite, cases[:1], device, names)
    run._warm_case("op", "cpu", names, cases[0])


def test_a_process_that_dies_while_compiling_stops_nothing():
    run._warm("op", [_Deadly()], torch.device("cpu"), ["ours"])


class _Deadly:
    """A case that kills the process it is sent to."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_failing_case_is_reported_and_the_others_run(tmp_path, monkeypatch):
    suite = suites()["op"]

    def breaks(case, options):
        if case.positions == "f7+l7":
            raise RuntimeError("an illegal memory access")
        yield from suite.run(case, options)

    monkeypatch.setattr(run, "suites", lambda: {"op": dataclasses.replace(suite, run=breaks)})
    done = call(
        "run", "op", "--size", "ci", "--peer", "ours", "--seconds", 0, "--rounds", 1,
        "--device", "cpu", "--output", tmp_path,
    )  # fmt: skip
    assert done.exit_code == 1
    assert "RuntimeError: an illegal memory access" in done.stderr
    assert {row.case[:3] for row in read(tmp_path)} == {"all"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "nothing"], "SUITE must be one of op, orthonormal"),
        (["run", "op", "--peer", "nobody"], "--peer must be one of frozen"),
        (["run", "op", "--size", "huge"], "--size takes ci, cpu, gpu, got 'huge'"),
        (["run", "op", "--device", "tpu"], "--device takes cpu or cuda, got 'tpu'"),
        (["run", "op", "--size", "ci", "--match", "zzz"], "no case of op (ci) contains 'zzz'"),
    ],
)
def test_bad_calls_give_a_single_line(tmp_path, arguments, says):
    extra = ["--output", tmp_path] if arguments[0] == "run" else []
    done = call(*arguments, *extra)
    assert done.exit_code == 2
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
