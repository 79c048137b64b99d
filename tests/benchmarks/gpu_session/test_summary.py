"""The summary of a session: ends of stages, and failed tests."""

from __future__ import annotations

from sample_rows import MACHINE

from benchmarks.gpu_session.stages import Outcome
from benchmarks.gpu_session.summary import pytest_summary, render_summary

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
    assert pytest_summary("...F") == ["pytest did not reach its summary"]
    assert pytest_summary("===== 3 passed in 0.12s =====") == ["3 passed in 0.12s"]


def test_the_summary_shows_the_end_of_each_stage(tmp_path):
    (tmp_path / "parity.log").write_text(LOG)
    outcomes = [Outcome("parity", "failed", 61.4, "2 failed | 3 passed")]
    page = render_summary(
        MACHINE, ["parity", "op", "step"], outcomes, "op", tmp_path, ["It lacks plots."]
    )
    for line in (
        "| parity | failed | 61 | 2 failed \\| 3 passed |",
        "| op | running |  |  |",
        "| step | not started |  |  |",
        "| commit | 0123456789ab |",
        "It lacks plots.",
        "test_b[loreft-D64 r1]",
    ):
        assert line in page
