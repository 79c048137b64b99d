"""A session: a real stage without a GPU, and the returned files after a kill."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from archive_members import members
from rich.console import Console
from sample_rows import MACHINE, row
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.gpu_session.archive import unpack
from benchmarks.gpu_session.session import Session, environment_of
from benchmarks.gpu_session.stages import Outcome
from benchmarks.machine import ROOT
from benchmarks.result_rows import parse, read

#: Runs a session of one stage, which writes a row and a half and then sleeps.
KILLED = """
import sys
from pathlib import Path
from rich.console import Console
from benchmarks.gpu_session import stages
from benchmarks.gpu_session.session import Session
stages.REPORT_EVERY = 0.1
home, scratch = Path(sys.argv[1]), Path(sys.argv[2])
session = Session(home, scratch, "h200", {machine}, False, ["op"], Console())
writes = (
    "import os, sys, time; from pathlib import Path\\n"
    "Path(sys.argv[1], 'pid').write_text(str(os.getpid()))\\n"
    "Path(sys.argv[1], 'op.jsonl').write_text(sys.argv[2] + chr(10) + sys.argv[2][:40])\\n"
    "time.sleep(60)"
)
stage = stages.Stage("op", ("-c", writes, stages.OUTPUT, sys.argv[3]), 60)
stages.run_stages([stage], 60, scratch, dict(__import__("os").environ), session.report)
"""


def test_a_killed_session_has_returned_its_rows(tmp_path):
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    script = KILLED.replace("{machine}", repr(MACHINE))
    with subprocess.Popen(
        [sys.executable, "-c", script, str(home), str(scratch), row().as_json()], cwd=ROOT
    ) as session:
        try:
            for _ in range(600):
                time.sleep(0.1)
                archive = home / "results.tar.gz"
                if archive.exists() and "h200/op.jsonl" in members(archive.read_bytes()):
                    break
        finally:
            session.kill()
            if (scratch / "pid").exists():
                os.kill(int((scratch / "pid").read_text()), signal.SIGKILL)
    assert session.wait() == -signal.SIGKILL
    packed = members((home / "results.tar.gz").read_bytes())
    assert [parse(line) for line in packed["h200/op.jsonl"].decode().splitlines()] == [row()]
    assert "| op | running |" in (home / "summary.md").read_text()
    assert json.loads(packed["h200/session.json"])["running"] == "op"


def test_a_tiny_session_of_one_stage(tmp_path):
    done = CliRunner().invoke(
        app,
        ["gpu", "--tiny", "--stage", "orthonormal", "--stage", "report",
         "--output", str(tmp_path / "home"), "--budget", "90", "--commit", "0123456789ab"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"results.tar.gz", "summary.md"}
    folder = unpack(tmp_path / "home" / "results.tar.gz", tmp_path / "results")
    assert folder == tmp_path / "results" / "cpu"
    session = json.loads((folder / "session.json").read_text())
    assert [(stage["stage"], stage["ended"]) for stage in session["stages"]] == [
        ("orthonormal", "passed"),
        ("report", "passed"),
    ]
    assert session["tiny"] and session["running"] is None
    assert {(each.suite, each.machine["commit"]) for each in read(folder)} == {
        ("orthonormal", "0123456789ab")
    }
    page = (tmp_path / "home" / "summary.md").read_text()
    assert "| orthonormal | passed |" in page and "## Orthonormal R" in page


@pytest.fixture(autouse=True)
def _commit(monkeypatch):
    """Restore REFT_COMMIT, which --commit of a session sets."""
    from benchmarks.machine import describe

    monkeypatch.setenv("REFT_COMMIT", "")
    describe.cache_clear()
    yield
    describe.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tiny", "--stage", "nothing"], "--stage takes parity, op, step, sweep"),
        ([], "no CUDA device; --tiny runs without one"),
    ],
)
def test_bad_calls_give_a_single_line(arguments, says):
    if not arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = CliRunner().invoke(app, ["gpu", *arguments])
    assert done.exit_code == 2 and says in done.stderr


@pytest.mark.parametrize("tiny", [True, False])
def test_stages_have_one_thread_and_only_tiny_ones_interpret(tiny, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0" if tiny else "1")
    environment = environment_of(tiny, "0123456789ab")
    assert environment["OMP_NUM_THREADS"] == environment["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert environment.get("TRITON_INTERPRET") == ("1" if tiny else None)
    assert environment["REFT_COMMIT"] == "0123456789ab"


def test_settings_are_returned_as_a_separate_file(tmp_path):
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    session = Session(home, scratch, "h200", MACHINE, False, ["sweep"], Console(quiet=True))
    session.report([], "sweep")
    assert not (home / "settings.json").exists()
    (scratch / "settings.json").write_text("[]\n")
    session.report([Outcome("sweep", "stopped", 60.0, "")], None)
    assert (home / "settings.json").read_text() == "[]\n"
    assert {path.name for path in home.iterdir()} == {
        "results.tar.gz",
        "summary.md",
        "settings.json",
    }


def test_a_failed_report_does_not_stop_the_session(tmp_path):
    printed = io.StringIO()
    absent = tmp_path / "home"
    session = Session(absent, tmp_path, "h200", MACHINE, False, ["op"], Console(file=printed))
    session.report([], "op")
    assert "report not written" in printed.getvalue()
