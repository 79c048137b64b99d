"""Quantiles, interleaved rounds, clocks, and failed captures of CUDA graphs."""

from __future__ import annotations

import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import Clock, Effort, Quantiles, interleave, paired_ratio, quantiles


def test_quantiles_are_interpolated():
    assert quantiles([5, 1, 4, 2, 3, 6]) == Quantiles(3.5, 2.0, 5.0, 6)
    assert quantiles([7.0]) == Quantiles(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="at least one sample"):
        quantiles([])


def test_ratio_is_the_median_of_rounds_not_of_medians():
    # The second round was slow for both sides: the ratio does not change.
    assert paired_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]).median == 2.0
    assert paired_ratio([1.0, 9.0, 3.0], [1.0, 1.0, 1.0]).median == 3.0
    with pytest.raises(ValueError):
        paired_ratio([1.0], [1.0, 2.0])


def test_the_order_rotates_and_every_round_times_every_peer():
    calls = []

    def run(name):
        def call():
            calls.append(name)
            return {"phase": float(len(calls))}

        return call

    samples = interleave({name: run(name) for name in "abc"}, Effort(0, 4, 9, warmup=1))
    assert calls[:3] == ["a", "b", "c"]  # warm-up
    rounds = [calls[i : i + 3] for i in range(3, len(calls), 3)]
    assert len(rounds) == 4 and all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len({each[0] for each in rounds}) > 1 and len({each[-1] for each in rounds}) > 1
    assert {name: len(phases["phase"]) for name, phases in samples.items()} == dict.fromkeys(
        "abc", 4
    )
    assert samples["a"]["phase"] == [calls.index("a", 3 * r) + 1.0 for r in range(1, 5)]


def test_rounds_end_with_the_time_or_the_maximum():
    def slow():
        time.sleep(0.01)
        return {"x": 1.0}

    assert 3 <= len(interleave({"a": slow}, Effort(0.08, 3, 100))["a"]["x"]) <= 10
    assert len(interleave({"a": slow}, Effort(60.0, 1, 4))["a"]["x"]) == 4


def test_clock_times_each_step_separately():
    clock = Clock(torch.device("cpu"))
    times = clock(short=lambda: time.sleep(0.01), long=lambda: time.sleep(0.03))
    assert list(times) == ["short", "long"]
    assert 0.009 < times["short"] < times["long"]


class Captures:
    """The part of ``torch.cuda`` that capturing needs, without a GPU; streams are numbers."""

    Event = CUDAGraph = staticmethod(lambda **given: None)
    synchronize = staticmethod(lambda: None)

    def __init__(self):
        self.now, self.captured = 0, 0

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None, number=1)

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: None, number=self.now)

    def set_stream(self, stream):
        self.now = stream.number

    @contextmanager
    def stream(self, stream):
        yield

    @contextmanager
    def graph(self, graph):
        self.now, self.captured = 2, self.captured + 1
        yield  # after a failed call the capture stream stays current, as in PyTorch
        self.now = 0


def test_a_failed_capture_disables_capturing(monkeypatch):
    cuda = Captures()
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(timing, "_failed_capture", [])
    timing.graph_run("phase", [lambda: None])
    assert (cuda.now, cuda.captured, timing.failed_capture()) == (0, 1, None)
    calls = iter(range(10))

    def waits():
        if next(calls) > 0:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(RuntimeError, match="not permitted"):
        timing.graph_run("phase", [waits])
    assert (cuda.now, cuda.captured) == (0, 2)
    with pytest.raises(RuntimeError, match=r"an earlier capture failed: .* is capturing$"):
        timing.graph_run("phase", [lambda: None])
    assert cuda.captured == 2


def test_a_failure_before_capture_does_not_disable_capturing(monkeypatch):
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=Captures()))
    monkeypatch.setattr(timing, "_failed_capture", [])

    def fails():
        raise RuntimeError("out of resources")

    with pytest.raises(RuntimeError, match="out of resources"):
        timing.graph_run("phase", [fails])
    assert timing.failed_capture() is None
