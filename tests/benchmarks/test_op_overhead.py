"""Operator overhead: only calls that one step makes more often count."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.op_overhead import Profile, added_seconds, profiled


def test_equal_calls_are_equal_work():
    baseline = Profile({"mm [512]": (10, 1.0), "add [8]": (4, 0.02)}, 0.1)
    slow = Profile({"mm [512]": (10, 1.3), "add [8]": (4, 0.03)}, 0.1)
    assert added_seconds(slow, baseline) == 0


def test_calls_that_only_one_step_makes_count_at_their_average():
    baseline = Profile({"mm [512]": (10, 1.0), "mul [8]": (2, 0.5)}, 0.10)
    step = Profile({"mm [512]": (12, 2.4), "edit [8]": (3, 0.06)}, 0.15)
    assert added_seconds(step, baseline) == pytest.approx(2 * 0.2 + 0.06 - 0.5 + 0.05)
    assert added_seconds(baseline, baseline) == 0


def test_a_profile_separates_operators_shapes_and_python():
    a, b = torch.randn(64, 64), torch.randn(64, 32)

    def step():
        for _ in range(3):
            a @ b
        a @ a
        time.sleep(0.05)

    profile = profiled(step)
    counts = {name: count for name, (count, _) in profile.calls.items() if "aten::mm" in name}
    assert sorted(counts.values()) == [1, 3]
    assert profile.between >= 0.05
    assert all(seconds >= 0 for _, seconds in profile.calls.values())


def test_backward_is_in_the_profile():
    a = torch.randn(64, 64, requires_grad=True)
    profile = profiled(lambda: (a @ a).sum().backward())
    assert sum(count for name, (count, _) in profile.calls.items() if "aten::mm" in name) == 3


def test_additional_work_is_measured():
    a, b = torch.randn(300, 300), torch.randn(200, 200)

    def baseline():
        for _ in range(5):
            a @ a

    def step():
        baseline()
        for _ in range(4):
            b @ b

    longer, shorter = profiled(step), profiled(baseline)
    (extra,) = (seconds for name, (_, seconds) in longer.calls.items() if "mm [[200" in name)
    assert added_seconds(longer, shorter) == pytest.approx(
        extra + longer.between - shorter.between, rel=0.5, abs=1e-3
    )
