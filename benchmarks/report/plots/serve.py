"""How prefill and decoding grow with the number of adapters in a batch."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.report.plots.frame import SOFT, frame, legend, plain, style, ticks
from benchmarks.result_rows import Row

_DASHES = ("-", "--", ":")


def adapters(rows: Sequence[Row]) -> Figure:
    """Time over the base's by adapters in the batch: prefill for each kind of positions, decoding.

    Args:
        rows: of the suite "serve" with ratios to the base, counted where they are, else timed;
            pyreft's, which takes requests one by one, is a line across.
    """
    shape = rows[0].shape
    title = f"One batch of {shape['batch']} prompts of {shape['sequence']} tokens, many adapters"
    drawn = {row.peer: False for row in rows if row.shape["adapters"]}
    drawn |= {row.peer: True for row in rows if row.metric.endswith("_counted")}
    ways = ", ".join(f"{peer} {'counted' if drawn[peer] else 'timed'}" for peer in drawn)
    below = f"{ways}; rank 4 drawn through, 16 dashed, 64 dotted; LoRA: 8 on q, v"
    if "pyreft" in drawn:
        below += "; pyreft: one request's time, times their number"
    figure = frame((10, 3.9), title, rows, below)
    panels = [
        *((f"prefill, {one}", "prefill", one) for one in _positions(rows)),
        ("a decoded token", "decode", _positions(rows)[0]),
    ]
    shown: list[str] = []
    for axes, (name, metric, positions) in zip(
        figure.subplots(1, len(panels), sharex=True), panels, strict=True
    ):
        own = [row for row in rows if row.shape["positions"] == positions]
        counted = {row.peer for row in own if row.metric == f"{metric}_counted"}
        own = [
            row for row in own
            if row.shape["adapters"]
            and row.metric == (f"{metric}_counted" if row.peer in counted else metric)
        ]  # fmt: skip
        ranks = sorted({row.shape["rank"] for row in own})
        for peer in dict.fromkeys(row.peer for row in own):
            for dash, rank in zip(_DASHES, ranks, strict=False):
                line = [row for row in own if (row.peer, row.shape["rank"]) == (peer, rank)]
                line.sort(key=lambda row: row.shape["adapters"])
                look = style(peer)
                if peer == "pyreft" and line:  # one request after another, whosever they are
                    shown.append(peer)
                    axes.axhline(line[0].ratio or 0.0, color=look.color, linestyle=dash)
                if len(line) < 2:
                    continue
                shown.append(peer)
                axes.plot(
                    [row.shape["adapters"] for row in line],
                    [row.ratio or 0.0 for row in line],
                    color=look.color, marker=look.marker, markersize=look.size, linestyle=dash,
                )  # fmt: skip
        axes.axhline(1.0, color=SOFT, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(name, fontsize=10.5, loc="left")
        axes.set_xlabel("different adapters", fontsize=9)
        plain(axes)
        ticks(axes.xaxis, [1, 8, 64, 512], ["1", "8", "64", "512"])
        low, top = axes.get_ylim()
        low, top = min(low, 0.9), max(top, 1.3)
        axes.set_ylim(low, top)
        marks = [one for one in (0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20) if low <= one <= top]
        ticks(axes.yaxis, marks, [f"{one:g}×" for one in marks])
    legend(figure, shown)
    return figure


def _positions(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(str(row.shape["positions"]) for row in rows))
