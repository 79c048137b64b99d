"""The rehearsal: what is compiled is what the library asks for, and predictions add up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.gpu_session import rehearsal
from benchmarks.gpu_session.builds import HAZARD, Built, Request, of_launches, of_suites, of_sweep
from benchmarks.gpu_session.stages import BUDGETS
from benchmarks.suites import suites

ROOT = Path(__file__).parents[3]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

#: A training step and a forward of the smallest case of the step suite, with the launches noted: as
#: the suite itself does it in the interpreter, and as the rehearsal does it for a GPU.
STEP = """
import json, sys
import torch
from benchmarks.gpu_session import builds as stage_builds
from reft_kernels import launch_recorder
from benchmarks.peers.ours import wrap
from benchmarks.suites import models

how, seen = sys.argv[1], launch_recorder.record()
(case,) = models.step_cases("ci")
if how == "rehearsed":
    built = stage_builds.build(stage_builds.Request("step", "step", case, "step"))
    assert built.failed is None, built.failed
    print(json.dumps({"seen": sorted(seen), "seconds": built.seconds}))
else:
    from reft_kernels import dispatch, functional
    functional.choose = lambda *given: dispatch.Choice("triton", "as on a GPU")
    for tied in (True, False):
        wrapped = wrap(tied, models.build(case, torch.device("cpu")), case)
        batch = models.make_batch(case, torch.device("cpu"))
        models.step(wrapped, batch)()
        wrapped.model.eval()
        with torch.no_grad():
            wrapped.loss(batch)
    print(json.dumps({"seen": sorted(seen)}))
"""


def run_python(tmp_path: Path, source: str, *arguments: str, **environment: str) -> dict:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    clean |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments],
        capture_output=True, text=True, cwd=ROOT, env=clean | environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_triton
def test_a_model_step_asks_for_the_builds_that_the_suite_asks_for(tmp_path):
    rehearsed = run_python(tmp_path, STEP, "rehearsed")
    real = run_python(tmp_path, STEP, "real", TRITON_INTERPRET="1")
    assert rehearsed["seen"] == real["seen"]
    assert len(rehearsed["seconds"]) == len(real["seen"]) >= 4
    assert all(seconds > 0 for seconds in rehearsed["seconds"])


REPLAY = """
import json, sys
import torch
from benchmarks.gpu_session import builds as stage_builds
lines = sys.argv[1:]
requests = list(stage_builds.of_launches(lines))
built = [stage_builds.build(request) for request in requests]
print(json.dumps({
    "labels": [request.label for request in requests],
    "builds": [len(each.seconds) for each in built],
    "failed": [each.failed for each in built],
}))
"""
RECORD = """
import json, sys
from reft_kernels import lowrank_edit
from reft_kernels.testing import Case, make_edit, run_edit
from reft_kernels import launch_recorder
seen = launch_recorder.record()
import torch
for dtype in (torch.float32, torch.float64):
    run_edit(lowrank_edit, make_edit(Case(64, 2, (3,), dtype=dtype)), backend="triton")
print(json.dumps([json.dumps(json.loads(line) | {"test": "t"}) for line in seen]))
"""


@needs_triton
def test_launches_of_tests_are_compiled_once_and_float64_never(tmp_path):
    lines = run_python(tmp_path, RECORD, TRITON_INTERPRET="1")
    assert len(lines) == 6
    found = run_python(tmp_path, REPLAY, *lines, *lines)
    assert found == {"labels": ["t"] * 3, "builds": [1] * 3, "failed": [None] * 3}


def test_a_request_that_fails_says_why(tmp_path):
    source = """
import json
from benchmarks.gpu_session import builds as stage_builds
built = stage_builds.build(stage_builds.Request("parity", "launch", '{"kernel": "none"}', "x"))
print(json.dumps({"failed": built.failed, "seconds": built.seconds}))
"""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    assert run_python(tmp_path, source) == {"failed": "KeyError: 'arguments'", "seconds": []}


def test_every_suite_with_edits_is_asked():
    stages = {request.stage for request in of_suites()}
    assert stages == set(suites()) - {"orthonormal", "load"}
    assert {request.stage for request in of_sweep(1)} == {"sweep"}
    assert len(list(of_sweep(2))) > len(list(of_sweep(1))) > 20
    assert list(of_launches([])) == []


def built(stage: str, *seconds: float, label: str = "x", failed: str | None = None) -> Built:
    return Built(Request(stage, "op", None, label), seconds, failed)


def test_predictions_divide_builds_among_workers():
    found = {
        each.stage: each
        for each in rehearsal.predict(
            [
                built("parity", *(1.0,) * 24),
                built("parity", 5.0, label="y"),
                built("step", 2.0, 3.0),
            ],
            tests=120,
            starting=4.0,
        )
    }
    assert list(found) == list(BUDGETS)
    parity, step = found["parity"], found["step"]
    assert (parity.builds, parity.compiling) == (25, 29.0)
    assert parity.waiting == 24.0  # those of one test wait for one another
    assert parity.starting == 8.0 and parity.measuring == pytest.approx(120 * 0.1 / 12)
    assert (step.waiting, step.starting) == (5.0, 4.0)
    assert step.seconds == 9.0 + step.measuring


@pytest.fixture
def without_running(monkeypatch):
    """A rehearsal in which every step is done and has compiled what the list says."""
    compiled: list[Built] = []
    monkeypatch.setattr(rehearsal, "_run", lambda *args, **kwargs: "")
    monkeypatch.setattr(rehearsal, "_seconds_to_start", lambda: 1.0)
    monkeypatch.setattr(rehearsal, "_launches_of_tests", lambda *args: ([], 100))
    monkeypatch.setattr(rehearsal, "_compiled", lambda *args: compiled)
    return compiled


def rehearse(tmp_path):
    return CliRunner().invoke(app, ["rehearse", "--output", str(tmp_path)])


def test_a_rehearsal_that_fits_passes_and_is_written_down(tmp_path, without_running):
    without_running += [built("op", 1.0), built("sweep", failed="OutOfResources: too much")]
    done = rehearse(tmp_path)
    assert done.exit_code == 0, done.output
    assert "rehearsal passed" in done.output and "sum" in done.output
    report = json.loads((tmp_path / "rehearsal.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == list(BUDGETS)
    assert report["failed"] == ["x: OutOfResources: too much"]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (built("step", 500.0), "step takes "),
        (built("layer", 3.0, failed="CompilationError: no"), "layer, x: CompilationError: no"),
        (built("sweep", 1.0, failed=f"{HAZARD}: edit_rows_kernel"), f"sweep, x: {HAZARD}"),
    ],
    ids=["too-long", "does-not-compile", "computes-wrong"],
)
def test_a_rehearsal_that_does_not_fit_fails(tmp_path, without_running, found, says):
    without_running.append(found)
    done = rehearse(tmp_path)
    assert done.exit_code == 1 and says in done.stderr


def test_a_session_that_is_too_long_fails(tmp_path, without_running, monkeypatch):
    monkeypatch.setattr(rehearsal, "LIMIT", 10.0)
    done = rehearse(tmp_path)
    assert done.exit_code == 1 and "of 10" in done.stderr
