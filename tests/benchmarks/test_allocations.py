"""Allocations: peak and total of a call, bytes saved for backward, and operators."""

from __future__ import annotations

import torch

from benchmarks.allocations import Traffic, operations, saved_bytes, traffic


def test_peak_and_total():
    def call():
        first = torch.empty(1000)
        del first
        torch.empty(1000)

    call()
    assert traffic(call, torch.device("cpu")) == Traffic(peak=4000, allocated=8000)


def test_saved_bytes_count_each_storage_once_and_no_parameters():
    model = torch.nn.Linear(10, 20, bias=False)
    hidden = torch.randn(30, 10)
    # The product saves hidden and the weight; the square saves its input once.
    expected = 4 * (30 * 10 + 30 * 20)
    assert saved_bytes(lambda: (model(hidden) ** 2).sum(), model) == expected
    assert saved_bytes(lambda: (model(hidden) ** 2).sum()) >= expected


def test_operations():
    a, b = torch.ones(2), torch.ones(2)
    assert operations(lambda: (a + b) * a) == 2
