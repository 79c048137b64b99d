"""Quantiles, turns, clocks."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.timing import Clock, Effort, Quantiles, interleave, paired_ratio, quantiles


def test_quantiles_are_interpolated():
    assert quantiles([5, 1, 4, 2, 3, 6]) == Quantiles(3.5, 2.0, 5.0, 6)
    assert quantiles([7.0]) == Quantiles(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="at least one sample"):
        quantiles([])


def test_ratio_is_that_of_the_rounds_not_of_the_medians():
    # The second round was slow for both: the ratio does not see it.
    assert paired_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]).median == 2.0
    assert paired_ratio([1.0, 9.0, 3.0], [1.0, 1.0, 1.0]).median == 3.0
    with pytest.raises(ValueError):
        paired_ratio([1.0], [1.0, 2.0])


def test_turns_rotate_and_every_round_times_everybody():
    calls = []

    def run(name):
        def call():
            calls.append(name)
            return {"phase": float(len(calls))}

        return call

    samples = interleave({name: run(name) for name in "abc"}, Effort(0, 4, 9, warmup=1))
    assert calls[:3] == ["a", "b", "c"]  # warm-up
    rounds = [calls[i : i + 3] for i in range(3, len(calls), 3)]
    assert len(rounds) == 4 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({one[0] for one in rounds}) > 1 and len({one[-1] for one in rounds}) > 1
    assert {name: len(found["phase"]) for name, found in samples.items()} == dict.fromkeys("abc", 4)
    assert samples["a"]["phase"] == [calls.index("a", 3 * r) + 1.0 for r in range(1, 5)]


def test_rounds_go_on_until_the_time_is_over_and_no_further_than_the_bound():
    def slow():
        time.sleep(0.01)
        return {"x": 1.0}

    assert 3 <= len(interleave({"a": slow}, Effort(0.08, 3, 100))["a"]["x"]) <= 10
    assert len(interleave({"a": slow}, Effort(60.0, 1, 4))["a"]["x"]) == 4


def test_clock_times_each_step_by_itself():
    clock = Clock(torch.device("cpu"))
    times = clock(short=lambda: time.sleep(0.01), long=lambda: time.sleep(0.03))
    assert list(times) == ["short", "long"]
    assert 0.009 < times["short"] < times["long"]
