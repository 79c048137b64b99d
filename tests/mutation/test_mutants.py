"""Every wrong variant of the catalogue is noticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


@pytest.mark.slow
def test_every_mutant_is_killed(request):
    if request.config.getoption("--device") != "cpu":
        pytest.skip("not run: mutants live in the interpreter")
    done = subprocess.run([sys.executable, str(RUN)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed: ") >= 15
