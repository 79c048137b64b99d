"""Quantities, ratios and percentages as text, with three significant digits."""

from __future__ import annotations

import math

NONE, MINUS = "–", "−"
_SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
}


def quantity(value: float, unit: str) -> str:
    """Format a value with a suitable unit: "12.3 µs", "4.56 MB", "0 B"."""
    sign, size = (MINUS if value < 0 else ""), abs(value)
    scales = _SCALES.get(unit)
    if scales is None:
        return f"{sign}{size:,.0f}" if size == round(size) else sign + _digits(size)
    scale, name = next((pair for pair in scales if size >= 0.9995 * pair[0]), scales[-1])
    return f"{sign}{f'{size:.0f}' if name == 'B' else _digits(size / scale)} {name}"


def percent(ratio: float, unit: str = " %") -> str:
    """Format a ratio as its difference from 1: "+0.4 %", "−1.2 %", "+131 %"."""
    more = 100 * (ratio - 1)
    text = f"{abs(more):.{1 if abs(more) < 9.95 else 0}f}"
    sign = "" if float(text) == 0 else "+" if more > 0 else MINUS
    return f"{sign}{text}{unit}"


def times(ratio: float) -> str:
    """Format a ratio as a factor: "1.04×", "12.3×", "131×"."""
    return f"{_digits(ratio)}×"


def _digits(size: float) -> str:
    """Three significant digits without an exponent."""
    rounded = float(f"{size:.3g}")
    after = 2 if rounded == 0 else max(0, 2 - math.floor(math.log10(rounded)))
    return f"{size:.{after}f}"
