"""Kernel tests use the device or have a marker: the rule of tests/kernels/conftest.py, tried on
small test files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Simulates a GPU that is never used.
PRETEND = """
import torch
torch.cuda.is_available = lambda: True
"""
HEAD = """
import os
import pytest
"""
#: Refused tests, each for another reason, and an accepted one.
REFUSED = """
def test_neither(): pass

@pytest.mark.host
def test_no_reason(): pass

@pytest.mark.interpreter
def test_no_reason_of_the_interpreter(device): pass

@pytest.mark.host("a message")
def test_fine(): pass
"""
ACCEPTED = """
pytestmark = pytest.mark.host("a file of messages")

def test_message(): pass

@pytest.mark.interpreter("float64 kernels")
def test_interpreted(device): assert device.type == "cpu"

@pytest.mark.gpu("only a driver knows")
def test_driver(): assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"

@pytest.fixture
def tensor(device): return device

def test_on_the_device(tensor): print("on", tensor.type)
"""


@pytest.fixture
def run(tmp_path: Path):
    """Run pytest on a file of kernel tests."""
    kernels = tmp_path / "tests" / "kernels"
    kernels.mkdir(parents=True)
    for name in ("conftest.py", "kernels/conftest.py", "kernels/matrix_units.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    (tmp_path / "pretend.py").write_text(PRETEND)

    def started(source: str, device: str, *options: str) -> subprocess.CompletedProcess[str]:
        (kernels / "test_some.py").write_text(HEAD + source)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "CUBLAS"))}
        flags = ("-p", "pretend", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-rs", "-s")
        return subprocess.run(
            [sys.executable, "-m", "pytest", "--device", device, *flags, *options, str(kernels)],
            env=clean | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return started


def test_tests_that_do_not_say_where_they_run_are_an_error(run):
    done = run(REFUSED, "cuda", "-k", "nothing")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "has a marker gpu, host(reason) or interpreter(reason)" in done.stderr
    named = [line.split("::")[1] for line in done.stderr.splitlines() if "::" in line]
    assert named == ["test_neither", "test_no_reason", "test_no_reason_of_the_interpreter"]


def test_without_a_gpu_all_run_but_those_that_need_one(run):
    done = run(ACCEPTED, "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed, 1 skipped" in done.stdout and "on cpu" in done.stdout
    assert "not run: needs --device cuda, only a driver knows" in done.stdout


def test_on_a_gpu_what_runs_on_the_cpu_is_skipped_and_says_why(run):
    done = run(ACCEPTED, "cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed, 2 skipped" in done.stdout and "on cuda" in done.stdout
    assert "not run with --device cuda: a file of messages" in done.stdout
    assert "not run with --device cuda: float64 kernels" in done.stdout
