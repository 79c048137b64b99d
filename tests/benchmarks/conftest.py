"""The smallest size of every suite, measured once for all tests that look at its rows."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.peers import peers
from benchmarks.result_rows import Row
from benchmarks.suites import Options, suites
from benchmarks.timing import Effort


@functools.cache
def _measured(name: str) -> tuple[Row, ...]:
    options = Options(torch.device("cpu"), peers(), Effort(0, min_rounds=2, warmup=1))
    suite = suites()[name]
    return tuple(row for case in suite.cases("ci") for row in suite.run(case, options))


@pytest.fixture(scope="session")
def measured():
    """Suite name -> its rows."""
    return _measured
