"""The rehearsal: it compiles the builds that the library launches, and its predictions add up."""

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
from benchmarks.gpu_session.builds import (
    HAZARD,
    Built,
    Request,
    launch_requests,
    suite_requests,
    sweep_requests,
)
from benchmarks.gpu_session.stages import BUDGETS
from benchmarks.suites import suites

ROOT = Path(__file__).parents[3]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

#: Records launches in the interpreter: of an edit in float32 and float64, and of a training step
#: and a forward of the suite "step" at its smallest size.
INTERPRETED = """
import json
import torch
from benchmarks.peers.ours import wrap
from benchmarks.suites import models
from reft_kernels import dispatch, functional, lowrank_edit
from reft_kernels.devtools import launch_recorder
from reft_kernels.devtools.testing import Case, make_edit, run_edit

seen = launch_recorder.record()
for dtype in (torch.float32, torch.float64):
    run_edit(lowrank_edit, make_edit(Case(64, 2, (3,), dtype=dtype)), backend="triton")
lines = [json.dumps(json.loads(line) | {"test": "t"}) for line in seen]
seen.clear()
functional.choose = lambda *given: dispatch.Choice("triton", "as on a GPU")
(case,) = models.step_cases("ci")
for tied in (True, False):
    wrapped = wrap(tied, models.build(case, torch.device("cpu")), case)
    batch = models.make_batch(case, torch.device("cpu"))
    models.training_step(wrapped, batch)()
    wrapped.model.eval()
    with torch.no_grad():
        wrapped.loss(batch)
print(json.dumps({"lines": lines, "step": sorted(seen)}))
"""
#: Compiles the same for a GPU: the step first, then recorded launches, then a broken request.
REHEARSED = """
import json, sys
from benchmarks.gpu_session.builds import Request, build, launch_requests
from benchmarks.suites import models
from reft_kernels.devtools import launch_recorder

seen = launch_recorder.record()
(case,) = models.step_cases("ci")
step = build(Request("step", "step", case, "step"))
launched = sorted(seen)
requests = list(launch_requests(sys.argv[1:] * 2))
broken = Request("parity", "launch", '{"kernel": "none"}', "x")
built = [step, *map(build, requests), build(broken)]
print(json.dumps({
    "step": launched,
    "labels": [request.label for request in requests],
    "seconds": [each.seconds for each in built],
    "failed": [each.failed for each in built],
}))
"""


def run_python(folder: Path, source: str, *arguments: str, **environment: str) -> dict:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    clean |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments],
        capture_output=True, text=True, cwd=ROOT, env=clean | environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed: dict = json.loads(done.stdout.splitlines()[-1])
    return printed


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """The launches that the interpreter records."""
    return run_python(tmp_path_factory.mktemp("cache"), INTERPRETED, TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory, interpreted):
    """The builds of the rehearsal, from an empty cache."""
    return run_python(tmp_path_factory.mktemp("cache"), REHEARSED, *interpreted["lines"])


@needs_triton
def test_a_model_step_compiles_the_builds_that_the_suite_launches(interpreted, rehearsed):
    assert rehearsed["step"] == interpreted["step"]
    seconds = rehearsed["seconds"][0]
    assert len(seconds) == len(interpreted["step"]) >= 4
    assert all(each > 0 for each in seconds) and rehearsed["failed"][0] is None


@needs_triton
def test_recorded_launches_are_compiled_once_and_float64_never(interpreted, rehearsed):
    assert len(interpreted["lines"]) == 6
    assert rehearsed["labels"] == ["t"] * 3
    assert [len(seconds) for seconds in rehearsed["seconds"][1:4]] == [1, 1, 1]
    assert rehearsed["failed"][1:4] == [None] * 3


@needs_triton
def test_a_failed_request_gives_the_reason(rehearsed):
    assert (rehearsed["failed"][-1], rehearsed["seconds"][-1]) == ("KeyError: 'arguments'", [])


def test_every_suite_with_edits_has_requests():
    stages = {request.stage for request in suite_requests()}
    assert stages == set(suites()) - {"orthonormal", "load"}
    assert {request.stage for request in sweep_requests(1)} == {"sweep"}
    assert len(list(sweep_requests(2))) > len(list(sweep_requests(1))) > 20
    assert list(launch_requests([])) == []


def built(stage: str, *seconds: float, label: str = "x", failed: str | None = None) -> Built:
    return Built(Request(stage, "op", None, label), seconds, failed)


def test_predictions_divide_builds_among_workers():
    predictions = {
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
    assert list(predictions) == list(BUDGETS)
    parity, step = predictions["parity"], predictions["step"]
    assert (parity.builds, parity.compiling) == (25, 29.0)
    assert parity.waiting == 24.0  # builds of a test are sequential
    assert parity.starting == 8.0 and parity.measuring == pytest.approx(120 * 0.1 / 12)
    assert (step.waiting, step.starting) == (5.0, 4.0)
    assert step.seconds == 9.0 + step.measuring


@pytest.fixture
def without_running(monkeypatch):
    """A rehearsal without processes; it returns the list of compiled requests."""
    compiled: list[Built] = []
    monkeypatch.setattr(rehearsal, "_run", lambda *args, **kwargs: "")
    monkeypatch.setattr(rehearsal, "_seconds_to_start", lambda: 1.0)
    monkeypatch.setattr(rehearsal, "_launches_of_tests", lambda *args: ([], 100))
    monkeypatch.setattr(rehearsal, "_compiled", lambda *args: compiled)
    return compiled


def rehearse(tmp_path):
    return CliRunner().invoke(app, ["rehearse", "--output", str(tmp_path)])


def test_a_rehearsal_that_fits_passes_and_is_recorded(tmp_path, without_running):
    without_running += [built("op", 1.0), built("sweep", failed="OutOfResources: too much")]
    done = rehearse(tmp_path)
    assert done.exit_code == 0, done.output
    assert "rehearsal passed" in done.output and "sum" in done.output
    report = json.loads((tmp_path / "rehearsal.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == list(BUDGETS)
    assert report["failed"] == ["x: OutOfResources: too much"]


@pytest.mark.parametrize(
    ("compiled", "says"),
    [
        (built("step", 500.0), "step takes "),
        (built("layer", 3.0, failed="CompilationError: no"), "layer, x: CompilationError: no"),
        (built("sweep", 1.0, failed=f"{HAZARD}: edit_rows_kernel"), f"sweep, x: {HAZARD}"),
    ],
    ids=["too-long", "does-not-compile", "computes-wrong"],
)
def test_a_rehearsal_that_does_not_fit_fails(tmp_path, without_running, compiled, says):
    without_running.append(compiled)
    done = rehearse(tmp_path)
    assert done.exit_code == 1 and says in done.stderr


def test_a_session_that_is_too_long_fails(tmp_path, without_running, monkeypatch):
    monkeypatch.setattr(rehearsal, "LIMIT", 10.0)
    done = rehearse(tmp_path)
    assert done.exit_code == 1 and "of 10" in done.stderr
