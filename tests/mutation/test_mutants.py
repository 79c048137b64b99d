"""Every mutant of the catalogue makes a test fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


@pytest.mark.slow
def test_every_mutant_is_killed(request):
    """The tests of the unchanged library are part of the suite and not run a second time."""
    if request.config.getoption("--device") != "cpu":
        pytest.skip("not run: mutants are run by Triton's interpreter")
    command = [sys.executable, str(RUN), "--skip-unchanged"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("killed: ") >= 15
