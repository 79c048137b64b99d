"""Plots of the edit alone and of orthonormal R."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.report.number_format import quantity
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
from benchmarks.result_rows import Row

_PHASES = ("forward", "backward")


def bandwidth_plot(rows: Sequence[Row], how: str = "") -> Figure:
    """Share of a copy's bandwidth over arithmetic intensity; panels by phase and by positions.

    Args:
        rows: rows of the suite "op" with bytes, flops and the bandwidth of a copy.
        how: text that ends the title.
    """
    rows = [row for row in rows if row.share]
    panels_of = [
        (name, group)
        for name, every in (("every row edited", True), ("ends of the prompt edited", False))
        if (group := [row for row in rows if (row.shape.get("positions") == "all") is every])
    ]
    figure = frame(
        (11.6, 1.6 + 2.9 * len(panels_of)),
        f"Bandwidth of the edit{how}, relative to a copy on the same device",
        rows,
        "Marks: median of the cases within an octave of intensity; bars: minimum to maximum. "
        "Peers are shifted slightly to keep them apart.",
    )
    panels = figure.subplots(len(panels_of), 2, sharex="col", sharey="row", squeeze=False)
    peers = list(dict.fromkeys(row.peer for row in rows))
    speed = quantity(statistics.median(row.bandwidth or 0.0 for row in rows), "bytes")
    for line, (kind, group) in zip(panels, panels_of, strict=True):
        for axes, phase in zip(line, _PHASES, strict=True):
            for number, peer in enumerate(peers):
                cases = [r for r in group if r.metric.endswith(phase) and r.peer == peer]
                _bandwidth_marks(axes, cases, 1.035 ** (number - (len(peers) - 1) / 2))
            axes.axhline(100, color=INK, linewidth=1.2, linestyle=DASHED)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(f"{phase}, {kind}", fontsize=10.5, color=INK)
            logarithmic(axes.xaxis, "")
            logarithmic(axes.yaxis, " %")
            plain(axes)
        line[0].set_ylabel("needed bytes ÷ time,\nshare of a copy's bandwidth")
    for axes in panels[-1]:
        axes.set_xlabel("arithmetic intensity (flops / byte)")
    copy = Line2D([], [], color=INK, linewidth=1.2, linestyle=DASHED, label=f"a copy: {speed}/s")
    legend(figure, peers, [copy])
    return figure


def _bandwidth_marks(axes: Axes, rows: Sequence[Row], shift: float) -> None:
    """Draw a peer: the cases within an octave of intensity share a mark; x is times ``shift``."""
    octaves: dict[int, list[Row]] = {}
    for row in rows:
        octaves.setdefault(round(math.log2(_intensity(row))), []).append(row)
    look, points = style(rows[0].peer if rows else ""), []
    for _, group in sorted(octaves.items()):
        shares = [100 * (row.share or 0.0) for row in group]
        x = shift * statistics.median(map(_intensity, group))
        points.append((x, statistics.median(shares)))
        axes.vlines(x, min(shares), max(shares), color=look.color, alpha=0.3, linewidth=1.6)
    axes.plot(
        *zip(*points, strict=True) if points else ((), ()),
        color=look.color, marker=look.marker, markersize=look.size, linewidth=0.6 * look.width,
        linestyle=look.dash, zorder=4 if rows and rows[0].peer == "ours" else 3,
    )  # fmt: skip


def _intensity(row: Row) -> float:
    return (row.flops or 0) / (row.bytes or 1)


def time_plot(rows: Sequence[Row], how: str = "") -> Figure:
    """Time over the bytes that the edit must move, beside the time of a copy of as many bytes."""
    figure = frame((11.6, 5.0), f"Time of the edit{how} over the bytes that it must move", rows)
    panels = figure.subplots(1, 2, sharey=True)
    peers = list(dict.fromkeys(row.peer for row in rows))
    speeds = [row.bandwidth for row in rows if row.bandwidth]
    for axes, phase in zip(panels, _PHASES, strict=True):
        group = [row for row in rows if row.metric.endswith(phase)]
        for peer in reversed(peers):
            cases, look = [row for row in group if row.peer == peer], style(peer)
            axes.plot(
                [(row.bytes or 0) / 1e6 for row in cases], [row.value or 0.0 for row in cases],
                linestyle="none", color=look.color, marker=look.marker, markersize=look.size,
                alpha=0.85, markeredgecolor="white", markeredgewidth=0.5,
            )  # fmt: skip
        ends = sorted(row.bytes or 0 for row in group)
        if speeds and ends:
            speed = statistics.median(speeds)
            sizes = (ends[0], ends[-1])
            axes.plot(
                [size / 1e6 for size in sizes], [size / speed for size in sizes],
                color=INK, linewidth=1.2, linestyle=DASHED,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(phase, fontsize=10.5, color=INK)
        axes.set_xlabel("needed bytes (MB)")
        logarithmic(axes.xaxis, "")
        plain(axes)
    panels[0].set_ylim(bottom=0.4 * min(row.value or 1.0 for row in rows))
    for axes in panels:
        logarithmic(axes.yaxis, "s")
    panels[0].set_ylabel("time of one call")
    copy = Line2D([], [], color=INK, linewidth=1.2, linestyle=DASHED, label="a copy")
    legend(figure, peers, [copy] if speeds else [])
    return figure


def orthonormal_plot(rows: Sequence[Row]) -> Figure:
    """Time over D, a line per peer and rank."""
    figure = frame((10.0, 5.2), "Orthonormal R of one layer, forward and backward", rows)
    axes = figure.subplots()
    ranks = sorted({row.shape["rank"] for row in rows})
    peers = list(dict.fromkeys(row.peer for row in rows))
    styles: tuple[Dash, ...] = ("-", "--", ":", "-.")
    dashes = {rank: styles[number % len(styles)] for number, rank in enumerate(ranks)}
    for peer in peers:
        look = style(peer)
        for rank, dash in dashes.items():
            line = [row for row in rows if row.peer == peer and row.shape["rank"] == rank]
            line.sort(key=lambda row: row.shape["dim"])
            axes.plot(
                [row.shape["dim"] for row in line],
                [(row.value or 0.0) / row.shape["layers"] for row in line],
                color=look.color, marker=look.marker, markersize=look.size,
                linewidth=look.width, linestyle=dash,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    dims = sorted({row.shape["dim"] for row in rows})
    ticks(axes.xaxis, dims, [str(dim) for dim in dims])
    logarithmic(axes.yaxis, "s")
    axes.set_xlabel("hidden size D")
    axes.set_ylabel("time per layer")
    plain(axes)
    ranks_legend = [
        Line2D([], [], color=SOFT, linestyle=dash, linewidth=1.8, label=f"rank {rank}")
        for rank, dash in dashes.items()
    ]
    legend(figure, peers, ranks_legend)
    return figure
