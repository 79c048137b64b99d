"""Plots of the edit itself and of orthonormal R."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.report.plots.frame import (
    DASHED,
    INK,
    SOFT,
    Dash,
    frame,
    legend,
    logarithmic,
    plain,
    style,
    ticks,
)
from benchmarks.report.tables import quantity
from benchmarks.result_rows import Row

_PHASES = ("forward", "backward")


def bandwidth(rows: Sequence[Row], how: str = "") -> Figure:
    """Share of a copy's bandwidth over arithmetic intensity; panels by phase and by positions.

    Args:
        rows: op rows with bytes, flops and a copy's bandwidth.
        how: ends the title.
    """
    rows = [row for row in rows if row.share]
    kinds = [
        (name, own)
        for name, every in (("every row edited", True), ("ends of the prompt edited", False))
        if (own := [row for row in rows if (row.shape.get("positions") == "all") is every])
    ]
    figure = frame(
        (11.6, 1.6 + 2.9 * len(kinds)),
        f"The edit{how}: how close it comes to the device's own copy",
        rows,
        "Marks: the median of the cases within an octave of intensity; bars: from the least to "
        "the most. Small steps aside keep peers apart.",
    )
    panels = figure.subplots(len(kinds), 2, sharex="col", sharey="row", squeeze=False)
    peers = list(dict.fromkeys(row.peer for row in rows))
    speed = quantity(statistics.median(row.bandwidth or 0.0 for row in rows), "bytes")
    for line, (kind, own) in zip(panels, kinds, strict=True):
        for axes, phase in zip(line, _PHASES, strict=True):
            for number, peer in enumerate(peers):
                some = [r for r in own if r.metric.endswith(phase) and r.peer == peer]
                _roof(axes, some, 1.035 ** (number - (len(peers) - 1) / 2))
            axes.axhline(100, color=INK, linewidth=1.2, linestyle=DASHED)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(f"{phase}, {kind}", fontsize=10.5, color=INK)
            logarithmic(axes.xaxis, "")
            logarithmic(axes.yaxis, " %")
            plain(axes)
        line[0].set_ylabel("bytes the work needs ÷ time,\nshare of a copy's bandwidth")
    for axes in panels[-1]:
        axes.set_xlabel("arithmetic intensity of the work (flops / byte)")
    copy = Line2D([], [], color=INK, linewidth=1.2, linestyle=DASHED, label=f"a copy: {speed}/s")
    legend(figure, peers, [copy])
    return figure


def _roof(axes: Axes, rows: Sequence[Row], aside: float) -> None:
    """One peer: cases whose intensity is within the same octave are one mark."""
    near: dict[int, list[Row]] = {}
    for row in rows:
        near.setdefault(round(math.log2(_intensity(row))), []).append(row)
    look, points = style(rows[0].peer if rows else ""), []
    for _, own in sorted(near.items()):
        shares = [100 * (row.share or 0.0) for row in own]
        place = aside * statistics.median(map(_intensity, own))
        points.append((place, statistics.median(shares)))
        axes.vlines(place, min(shares), max(shares), color=look.color, alpha=0.3, linewidth=1.6)
    axes.plot(
        *zip(*points, strict=True) if points else ((), ()),
        color=look.color, marker=look.marker, markersize=look.size, linewidth=0.6 * look.width,
        linestyle=look.dash, zorder=4 if rows and rows[0].peer == "ours" else 3,
    )  # fmt: skip


def _intensity(row: Row) -> float:
    return (row.flops or 0) / (row.bytes or 1)


def work(rows: Sequence[Row], how: str = "") -> Figure:
    """Time over the bytes that the work needs, beside what a copy of them would take."""
    figure = frame((11.6, 5.0), f"Time of the edit{how}, by the bytes that it must move", rows)
    panels = figure.subplots(1, 2, sharey=True)
    peers = list(dict.fromkeys(row.peer for row in rows))
    speeds = [row.bandwidth for row in rows if row.bandwidth]
    for axes, phase in zip(panels, _PHASES, strict=True):
        own = [row for row in rows if row.metric.endswith(phase)]
        for peer in reversed(peers):
            some, look = [row for row in own if row.peer == peer], style(peer)
            axes.plot(
                [(row.bytes or 0) / 1e6 for row in some], [row.value or 0.0 for row in some],
                linestyle="none", color=look.color, marker=look.marker, markersize=look.size,
                alpha=0.85, markeredgecolor="white", markeredgewidth=0.5,
            )  # fmt: skip
        ends = sorted(row.bytes or 0 for row in own)
        if speeds and ends:
            pace = statistics.median(speeds)
            sizes = (ends[0], ends[-1])
            axes.plot(
                [size / 1e6 for size in sizes], [size / pace for size in sizes],
                color=INK, linewidth=1.2, linestyle=DASHED,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(phase, fontsize=10.5, color=INK)
        axes.set_xlabel("bytes the work needs (MB)")
        logarithmic(axes.xaxis, "")
        plain(axes)
    panels[0].set_ylim(bottom=0.4 * min(row.value or 1.0 for row in rows))
    for axes in panels:
        logarithmic(axes.yaxis, "s")
    panels[0].set_ylabel("time of one call")
    copy = Line2D([], [], color=INK, linewidth=1.2, linestyle=DASHED, label="at a copy's pace")
    legend(figure, peers, [copy] if speeds else [])
    return figure


def orthonormal(rows: Sequence[Row]) -> Figure:
    """Time over D, a line by peer and rank."""
    figure = frame((10.0, 5.2), "Orthonormal R of one layer, forward and backward", rows)
    axes = figure.subplots()
    ranks = sorted({row.shape["rank"] for row in rows})
    peers = list(dict.fromkeys(row.peer for row in rows))
    kinds: tuple[Dash, ...] = ("-", "--", ":", "-.")
    dashes = {rank: kinds[number % len(kinds)] for number, rank in enumerate(ranks)}
    for peer in peers:
        look = style(peer)
        for rank, dash in dashes.items():
            own = [row for row in rows if row.peer == peer and row.shape["rank"] == rank]
            own.sort(key=lambda row: row.shape["dim"])
            axes.plot(
                [row.shape["dim"] for row in own],
                [(row.value or 0.0) / row.shape["layers"] for row in own],
                color=look.color, marker=look.marker, markersize=look.size,
                linewidth=look.width, linestyle=dash,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    dims = sorted({row.shape["dim"] for row in rows})
    ticks(axes.xaxis, dims, [str(dim) for dim in dims])
    logarithmic(axes.yaxis, "s")
    axes.set_xlabel("hidden size D")
    axes.set_ylabel("time a layer")
    plain(axes)
    lines = [
        Line2D([], [], color=SOFT, linestyle=dash, linewidth=1.8, label=f"rank {rank}")
        for rank, dash in dashes.items()
    ]
    legend(figure, peers, lines)
    return figure
