"""A session: a real stage without a GPU, and what is at home however the command ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from rich.console import Console
from sample_rows import MACHINE, row
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.gpu_session.archive import pack, unpack
from benchmarks.gpu_session.session import Session, environment_of
from benchmarks.gpu_session.stages import Outcome
from benchmarks.gpu_session.summary import pytest_summary, render
from benchmarks.machine import ROOT
from benchmarks.result_rows import parse, read

#: Runs a session of one stage that writes a row and a half, and then sleeps.
KILLED = """
import sys
from pathlib import Path
from rich.console import Console
from benchmarks.gpu_session import stages
from benchmarks.gpu_session.session import Session
stages.LOOK = 0.1
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


def members(archive):
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {one.name: tar.extractfile(one).read() for one in tar.getmembers()}


def test_rows_are_at_home_when_everything_is_killed(tmp_path):
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
    assert {one.name for one in (tmp_path / "home").iterdir()} == {"results.tar.gz", "summary.md"}
    folder = unpack(tmp_path / "home" / "results.tar.gz", tmp_path / "results")
    assert folder == tmp_path / "results" / "cpu"
    session = json.loads((folder / "session.json").read_text())
    assert [(one["stage"], one["ended"]) for one in session["stages"]] == [
        ("orthonormal", "passed"),
        ("report", "passed"),
    ]
    assert session["tiny"] and session["running"] is None
    assert {(one.suite, one.machine["commit"]) for one in read(folder)} == {
        ("orthonormal", "0123456789ab")
    }
    page = (tmp_path / "home" / "summary.md").read_text()
    assert "| orthonormal | passed |" in page and "## Orthonormal R" in page


@pytest.fixture(autouse=True)
def _commit(monkeypatch):
    """A session's --commit is an environment variable: of this test alone."""
    from benchmarks.machine import describe

    monkeypatch.setenv("REFT_COMMIT", "")
    describe.cache_clear()
    yield
    describe.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tiny", "--stage", "nothing"], "--stage must be one of parity, op, step, sweep"),
        ([], "no CUDA device; --tiny tries everything"),
    ],
)
def test_bad_calls_are_one_line(arguments, says):
    if not arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = CliRunner().invoke(app, ["gpu", *arguments])
    assert done.exit_code == 2 and says in done.stderr


@pytest.mark.parametrize("tiny", [True, False])
def test_a_stage_has_one_thread_and_only_a_tiny_one_interprets(tiny, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0" if tiny else "1")
    environment = environment_of(tiny, "0123456789ab")
    assert environment["OMP_NUM_THREADS"] == environment["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert environment.get("TRITON_INTERPRET") == ("1" if tiny else None)
    assert environment["REFT_COMMIT"] == "0123456789ab"


def test_settings_come_home_as_a_file_of_their_own(tmp_path):
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    session = Session(home, scratch, "h200", MACHINE, False, ["sweep"], Console(quiet=True))
    session.report([], "sweep")
    assert not (home / "settings.json").exists()
    (scratch / "settings.json").write_text("[]\n")
    session.report([Outcome("sweep", "stopped", 60.0, "")], None)
    assert (home / "settings.json").read_text() == "[]\n"
    assert {one.name for one in home.iterdir()} == {
        "results.tar.gz",
        "summary.md",
        "settings.json",
    }


def test_a_disk_that_is_full_stops_nothing(tmp_path):
    said = io.StringIO()
    absent = tmp_path / "home"
    session = Session(absent, tmp_path, "h200", MACHINE, False, ["op"], Console(file=said))
    session.report([], "op")
    assert "not written this time" in said.getvalue()


LOG = """\
..F.E
=================================== FAILURES ===================================
FAILURE in a test | of something
=========================== short test summary info ============================
FAILED tests/kernels/test_a.py::test_b[loreft-D64 r1] - AssertionError: out 1.1e-3
ERROR tests/kernels/test_a.py::test_c
2 failed, 3 passed, 1 error in 12.34s (0:00:12)
"""
FAILED = """\
- `tests/kernels/test_a.py::test_b[loreft-D64 r1]` AssertionError: out 1.1e-3
- `tests/kernels/test_a.py::test_c`"""


def test_failed_tests_are_named():
    assert pytest_summary(LOG) == [
        "2 failed, 3 passed, 1 error in 12.34s (0:00:12)",
        FAILED,
    ]
    assert pytest_summary("...F") == ["pytest has not come to its summary"]
    assert pytest_summary("===== 3 passed in 0.12s =====") == ["3 passed in 0.12s"]


def test_the_summary_tells_how_each_stage_ended(tmp_path):
    (tmp_path / "parity.log").write_text(LOG)
    outcomes = [Outcome("parity", "failed", 61.4, "2 failed | 3 passed")]
    page = render(MACHINE, ["parity", "op", "step"], outcomes, "op", tmp_path, ["It lacks plots."])
    for line in (
        "| parity | failed | 61 | 2 failed \\| 3 passed |",
        "| op | running |  |  |",
        "| step | not begun |  |  |",
        "| commit | 0123456789ab |",
        "It lacks plots.",
        "test_b[loreft-D64 r1]",
    ):
        assert line in page


def test_an_archive_that_would_be_too_large_lacks_plots_then_logs(tmp_path):
    (tmp_path / "op.jsonl").write_text(row().as_json() + "\n")
    (tmp_path / "plot.png").write_bytes(os.urandom(4000))
    (tmp_path / "op.log").write_bytes(os.urandom(4000))
    whole, nothing = pack(tmp_path, "h200")
    assert nothing == [] and len(members(whole)) == 3
    smaller, left_out = pack(tmp_path, "h200", limit=len(whole) - 1)
    assert left_out == ["plots"] and set(members(smaller)) == {"h200/op.jsonl", "h200/op.log"}
    smallest, left_out = pack(tmp_path, "h200", limit=3000)
    assert left_out == ["plots", "logs"] and set(members(smallest)) == {"h200/op.jsonl"}
