"""Counted overheads: only what one side runs more often counts, however slow the rest was."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.op_overhead import Profile, added, profiled


def test_equal_calls_are_equal_work():
    floor = Profile({"mm [512]": (10, 1.0), "add [8]": (4, 0.02)}, 0.1)
    slow = Profile({"mm [512]": (10, 1.3), "add [8]": (4, 0.03)}, 0.1)
    assert added(slow, floor) == 0


def test_calls_that_one_side_makes_count_at_their_average():
    floor = Profile({"mm [512]": (10, 1.0), "mul [8]": (2, 0.5)}, 0.10)
    own = Profile({"mm [512]": (12, 2.4), "edit [8]": (3, 0.06)}, 0.15)
    assert added(own, floor) == pytest.approx(2 * 0.2 + 0.06 - 0.5 + 0.05)
    assert added(floor, floor) == 0


def test_a_profile_tells_operators_shapes_and_python_apart():
    a, b = torch.randn(64, 64), torch.randn(64, 32)

    def step():
        for _ in range(3):
            a @ b
        a @ a
        time.sleep(0.05)

    found = profiled(step)
    counts = {name: count for name, (count, _) in found.calls.items() if "aten::mm" in name}
    assert sorted(counts.values()) == [1, 3]
    assert found.between >= 0.05
    assert all(seconds >= 0 for _, seconds in found.calls.values())


def test_backward_is_in_the_profile():
    a = torch.randn(64, 64, requires_grad=True)
    found = profiled(lambda: (a @ a).sum().backward())
    assert sum(count for name, (count, _) in found.calls.items() if "aten::mm" in name) == 3


def test_work_on_top_of_equal_work_is_found():
    a, b = torch.randn(300, 300), torch.randn(200, 200)

    def floor():
        for _ in range(5):
            a @ a

    def own():
        floor()
        for _ in range(4):
            b @ b

    one, other = profiled(own), profiled(floor)
    (extra,) = (seconds for name, (_, seconds) in one.calls.items() if "mm [[200" in name)
    assert added(one, other) == pytest.approx(
        extra + one.between - other.between, rel=0.5, abs=1e-3
    )
