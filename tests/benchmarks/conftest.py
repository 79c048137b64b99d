"""The smallest size of every suite, measured once for all tests that read its rows."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch

from benchmarks.peers import peers
from benchmarks.result_rows import Row
from benchmarks.suites import Options, models, suites
from benchmarks.timing import Effort

#: Peers of the suite "layer". It runs the code of the suite "step", which has all peers here.
LAYER_PEERS = ("frozen", "frozen again", "ours", "ours, untied")


@functools.cache
def _measured(name: str) -> tuple[Row, ...]:
    participants = [peer for peer in peers() if name != "layer" or peer.name in LAYER_PEERS]
    options = Options(torch.device("cpu"), participants, Effort(0, min_rounds=2, warmup=1))
    suite = suites()[name]
    with mock.patch.object(models, "_PROFILES", 1):  # the profiler is slow
        return tuple(row for case in suite.cases("ci") for row in suite.run(case, options))


@pytest.fixture(scope="session")
def measured():
    """A function that maps the name of a suite to its rows."""
    return _measured
