"""Plots of training steps: the time that each peer adds to the frozen baseline."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.report.number_format import percent
from benchmarks.report.plots.frame import (
    BAND,
    BASELINES,
    INK,
    SOFT,
    frame,
    legend,
    plain,
    style,
    ticks,
)
from benchmarks.report.tables import field_list, model_label
from benchmarks.result_rows import Row
from reft.positions import parse_positions

_TICKS = (-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100, 300, 1000, 3000)
#: Maps the swept quantity to the label of its axis and to the field of the shape.
_SWEEPS = {
    "positions": ("edited positions", "positions"),
    "rank": ("rank", "rank"),
    "layers": ("edited layers", "edited"),
    "sequence": ("sequence length (tokens)", "sequence"),
}


def overhead_plot(rows: Sequence[Row]) -> Figure:
    """Time added to the frozen baseline in percent: a panel per model, a bar per peer."""
    cases = list(dict.fromkeys(row.case for row in rows))
    peers = [peer for peer in dict.fromkeys(row.peer for row in rows) if peer not in BASELINES]
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    subject = "two decoder layers" if rows[0].suite == "layer" else "whole models"
    figure = frame(
        (11.0, 1.2 + lines * (0.85 + 0.27 * len(peers))),
        f"Training step of {subject}: time added to the frozen baseline",
        rows,
        f"{_bar_legend(rows)}; grey: the baseline measured a second time, the noise; linear within "
        "±1 %, logarithmic beyond.",
    )
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, case in zip(panels, cases, strict=False):
        by_peer = {row.peer: row for row in rows if row.case == case}
        _bars(axes, by_peer, peers)
        axes.set_title(model_label(next(iter(by_peer.values())), rows), fontsize=10.5, color=INK)
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("overhead of a step (%)", fontsize=9.5)
    for axes in panels[len(cases) :]:
        axes.remove()
    _scale(panels[0], [row for row in rows if row.peer != row.baseline], vertical=False)
    return figure


def _bar_legend(rows: Sequence[Row]) -> str:
    if any(row.metric == "op_overhead" for row in rows):
        return "Bars: added operators and Python; whiskers: p20 to p80 of the rounds"
    return "Bars: median; whiskers: p20 to p80 of the rounds"


def _bars(axes: Axes, by_peer: Mapping[str, Row], peers: Sequence[str]) -> None:
    again = by_peer.get("frozen again")
    if again is not None:
        low, _, high = _percentages(again)
        axes.axvspan(low, high, color=BAND, linewidth=0, zorder=0.5)
    axes.axvline(0, color="#555555", linewidth=0.9, zorder=2.5)
    for y, peer in enumerate(peers):
        row = by_peer.get(peer)
        label: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
        if row is None:
            axes.annotate(
                "absent", (0, y), (5, 0), fontsize=8.5, color=SOFT, style="italic", **label
            )
            continue
        low, middle, high = _percentages(row)
        color = style(peer).color
        axes.barh(
            y, middle, height=0.66, zorder=2, edgecolor=color, linewidth=1.1,
            facecolor=_pale(color) if "untied" in peer else color,
        )  # fmt: skip
        axes.plot([low, high], [y, y], color=INK, linewidth=1.3, zorder=3)
        weight = "bold" if peer.startswith("ours") else "normal"
        axes.annotate(
            percent(1 + middle / 100), (max(high, 0), y), (5, 0), fontsize=9, color=INK,
            fontweight=weight, **label,
        )  # fmt: skip
    axes.set_yticks(range(len(peers)), peers)
    axes.set_ylim(len(peers) - 0.45, -0.55)
    plain(axes)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _pale(color: str) -> tuple[float, float, float]:
    red, green, blue = (0.35 * part + 0.65 for part in to_rgb(color))
    return red, green, blue


def _percentages(row: Row) -> tuple[float, float, float]:
    """p20, median and p80 of a ratio, as percent above 1."""
    middle = row.ratio if row.ratio is not None else 1.0
    low = middle if row.ratio_p20 is None else row.ratio_p20
    high = middle if row.ratio_p80 is None else row.ratio_p80
    return 100 * (low - 1), 100 * (middle - 1), 100 * (high - 1)


def _scale(axes: Axes, rows: Sequence[Row], *, vertical: bool) -> None:
    """Scale an axis of percentages from 0.1 to 1000: linear within ±1, logarithmic beyond."""
    spans = [_percentages(row) for row in rows]
    low, high = min([-0.8, *(s[0] for s in spans)]), max([3.0, *(s[2] for s in spans)])
    # The limits leave room for the number beside the longest bar.
    limits = (1.25 * low, 1.6 * high if vertical else 5 * high)
    shown = [tick for tick in _TICKS if limits[0] <= tick <= limits[1]]
    labels = [percent(1 + tick / 100, "").removesuffix(".0") for tick in shown]
    if vertical:
        axes.set_yscale("symlog", linthresh=1, linscale=0.7)
        axes.set_ylim(*limits)
    else:
        axes.set_xscale("symlog", linthresh=1, linscale=0.7)
        axes.set_xlim(*limits)
    ticks(axes.yaxis if vertical else axes.xaxis, shown, labels)


def sweep_plot(rows: Sequence[Row]) -> Figure:
    """A panel per swept quantity, a line per peer; all rows have the same base model."""
    swept = [name for name in _SWEEPS if any(row.shape["sweep"] == name for row in rows)]
    columns = min(2, len(swept))
    lines = -(-len(swept) // columns)
    names = ("batch", *(field for _, field in _SWEEPS.values()), "dtype")
    defaults = {name: statistics.mode(row.shape[name] for row in rows) for name in names}
    figure = frame(
        (11.6, 1.2 + 3.0 * lines),
        f"Overhead of a training step: {rows[0].shape['model']}, one quantity varied at a time",
        rows,
        f"Grey: the baseline measured a second time, the noise. Defaults: {field_list(defaults)}.",
    )
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    peers = [peer for peer in dict.fromkeys(row.peer for row in rows) if peer not in BASELINES]
    for axes, sweep in zip(panels, swept, strict=False):
        label, field = _SWEEPS[sweep]
        _lines(axes, [row for row in rows if row.shape["sweep"] == sweep], field, peers)
        axes.set_xlabel(label)
    for axes in panels[len(swept) :]:
        axes.remove()
    _scale(panels[0], rows, vertical=True)
    for axes in panels[::columns]:
        axes.set_ylabel("overhead of a step (%)")
    legend(figure, peers, [Patch(color=BAND, label="noise")])
    return figure


def _lines(axes: Axes, rows: Sequence[Row], field: str, peers: Sequence[str]) -> None:
    amounts = {row.shape[field]: _amount(row, row.shape[field]) for row in rows}
    values = sorted(amounts, key=amounts.__getitem__)

    def line(peer: str) -> list[tuple[int, float, float, float]]:
        """(x, p20, median, p80) of a peer, by x."""
        return sorted(
            (values.index(row.shape[field]), *_percentages(row)) for row in rows if row.peer == peer
        )

    again = line("frozen again")
    axes.fill_between(
        [x for x, *_ in again], [low for _, low, _, _ in again], [high for *_, high in again],
        color=BAND, linewidth=0, zorder=0.5,
    )  # fmt: skip
    for peer in reversed(peers):
        points, look = line(peer), style(peer)
        axes.plot(
            [x for x, *_ in points], [median for _, _, median, _ in points], color=look.color,
            marker=look.marker, markersize=look.size, linewidth=look.width, linestyle=look.dash,
        )  # fmt: skip
    ticks(axes.xaxis, range(len(values)), [str(value) for value in values])
    axes.margins(x=0.06)
    plain(axes)


def _amount(row: Row, value: Any) -> float:
    """A number to sort values by; for positions the number per sequence, half of it prompt."""
    if not isinstance(value, str):
        return float(value)
    positions = parse_positions(value)
    length: int = row.shape["sequence"]
    ends = positions.first + positions.last
    return {"prompt": length / 2, "all": length}.get(positions.kind, ends)
