"""Quantities, percentages and factors as text."""

from __future__ import annotations

import pytest

from benchmarks.report.number_format import percent, quantity, times


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12.0, "s", "12.0 s"),
        (0.25, "s", "250 ms"),
        (9.996e-4, "s", "1.00 ms"),
        (1.234e-6, "s", "1.23 µs"),
        (-2e-3, "s", "−2.00 ms"),
        (0, "bytes", "0 B"),
        (999, "bytes", "999 B"),
        (2_500_000, "bytes", "2.50 MB"),
        (134e6, "bytes", "134 MB"),
        (-4096, "bytes", "−4.10 kB"),
        (3e9, "bytes", "3.00 GB"),
        (40, "count", "40"),
        (0.5, "", "0.500"),
    ],
)
def test_quantities(value, unit, text):
    assert quantity(value, unit) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(1.004, "+0.4 %"), (0.988, "−1.2 %"), (2.31, "+131 %"), (1.0004, "0.0 %"), (1.0999, "+10 %")],
)
def test_percent(ratio, text):
    assert percent(ratio) == text


def test_times():
    assert [times(ratio) for ratio in (0.5, 1.0, 12.34, 250)] == [
        "0.500×",
        "1.00×",
        "12.3×",
        "250×",
    ]
