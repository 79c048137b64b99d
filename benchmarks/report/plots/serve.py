"""Prefill and decoding time over the number of adapters in a batch."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report.plots.frame import SOFT, frame, legend, plain, style, ticks
from benchmarks.result_rows import Row

_DASHES = ("-", "--", ":")
_MARKS = (0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20)


def serving_plot(rows: Sequence[Row]) -> Figure:
    """Time ÷ the base's time by adapters in the batch: prefill per kind of positions, and decoding.

    Args:
        rows: of the suite "serve" with ratios to the base. The operator overhead is drawn where
            there is one, else the timed ratio. pyreft, which takes requests one at a time, is a
            horizontal line.
    """
    shape = rows[0].shape
    title = f"One batch of {shape['batch']} prompts of {shape['sequence']} tokens, many adapters"
    kinds = {row.peer: "timed" for row in rows if row.shape["adapters"]}
    kinds |= {row.peer: "operators" for row in rows if row.metric.endswith("_op_overhead")}
    below = ", ".join(f"{peer}: {kind}" for peer, kind in kinds.items())
    below += "; rank 4 solid, 16 dashed, 64 dotted; LoRA: 8 on q, v"
    if "pyreft" in kinds:
        below += "; pyreft: time of one request × their number"
    figure = frame((10, 3.9), title, rows, below)
    positions = list(dict.fromkeys(str(row.shape["positions"]) for row in rows))
    panels = [
        *((f"prefill, {kind}", "prefill", kind) for kind in positions),
        ("a decoding step", "decode", positions[0]),
    ]
    peers: list[str] = []
    for axes, (name, metric, kind) in zip(
        figure.subplots(1, len(panels), sharex=True), panels, strict=True
    ):
        peers += _lines(axes, [row for row in rows if row.shape["positions"] == kind], metric)
        axes.set_title(name, fontsize=10.5, loc="left")
        _scale(axes)
    legend(figure, peers)
    return figure


def _lines(axes: Axes, rows: Sequence[Row], metric: str) -> list[str]:
    """Draw a line per peer and rank; return the peers that have one."""
    profiled = {row.peer for row in rows if row.metric == f"{metric}_op_overhead"}
    rows = [
        row for row in rows
        if row.shape["adapters"]
        and row.metric == (f"{metric}_op_overhead" if row.peer in profiled else metric)
    ]  # fmt: skip
    ranks = sorted({row.shape["rank"] for row in rows})
    peers = []
    for peer in dict.fromkeys(row.peer for row in rows):
        look = style(peer)
        for dash, rank in zip(_DASHES, ranks, strict=False):
            line = [row for row in rows if (row.peer, row.shape["rank"]) == (peer, rank)]
            line.sort(key=lambda row: row.shape["adapters"])
            if peer == "pyreft" and line:
                peers.append(peer)
                axes.axhline(line[0].ratio or 0.0, color=look.color, linestyle=dash)
            if len(line) < 2:
                continue
            peers.append(peer)
            axes.plot(
                [row.shape["adapters"] for row in line],
                [row.ratio or 0.0 for row in line],
                color=look.color, marker=look.marker, markersize=look.size, linestyle=dash,
            )  # fmt: skip
    return peers


def _scale(axes: Axes) -> None:
    axes.axhline(1.0, color=SOFT, linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("different adapters", fontsize=9)
    plain(axes)
    ticks(axes.xaxis, [1, 8, 64, 512], ["1", "8", "64", "512"])
    low, high = axes.get_ylim()
    low, high = min(low, 0.9), max(high, 1.3)
    axes.set_ylim(low, high)
    marks = [mark for mark in _MARKS if low <= mark <= high]
    ticks(axes.yaxis, marks, [f"{mark:g}×" for mark in marks])
