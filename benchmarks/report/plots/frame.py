"""Common parts of plots: the style of a peer, the frame with title and device, and the legend."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.result_rows import Row

INK, SOFT, BAND = "#222222", "#666666", "#d9d9d9"
Dash = Literal["-", "--", ":", "-."]
#: The line style of the bandwidth of a copy.
DASHED = (0, (5, 3))
#: Peers that other peers are compared with.
BASELINES = ("frozen", "frozen again", "base")
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


@dataclass(frozen=True, slots=True)
class Style:
    """Colour (of Okabe and Ito's palette), marker and line of a peer."""

    color: str
    marker: str
    dash: Dash = "-"
    width: float = 1.5
    size: float = 5.5


_STYLES = {
    "ours": Style("#0058a8", "o", width=2.8, size=7),
    "ours, untied": Style("#0058a8", "o", "--", 2.2),
    "ours (triton)": Style("#1a1a5e", "^", ":"),
    "ours (torch)": Style("#56b4e9", "o", "-."),
    "reference": Style("#7a7a7a", "s"),
    "reference, compiled": Style("#b0b0b0", "D"),
    "pyreft": Style("#d55e00", "v"),
    "pyreft, untied": Style("#d55e00", "v", "--"),
    "pyreft, R given": Style("#cc79a7", "<"),
    "adapters": Style("#e69f00", "P"),
    "adapters, untied": Style("#e69f00", "P", "--"),
    "LoRA": Style("#009e73", "X"),
}
_OTHER = Style("#000000", "*")


def style(peer: str) -> Style:
    """The style of a peer, the same in every plot."""
    return _STYLES.get(peer, _OTHER)


def frame(size: tuple[float, float], title: str, rows: Sequence[Row], below: str = "") -> Figure:
    """An empty figure with its title, the device under it, and small print at the bottom.

    Args:
        size: width and height in inches, at 120 pixels an inch.
    """
    width, height = size
    figure = Figure(figsize=size, dpi=120, layout="constrained", facecolor="white")
    head, foot = 0.68 / height, (0.3 if below else 0.05) / height
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0, foot, 1, 1 - head - foot))  # type: ignore[call-arg]
    left = 0.12 / width
    figure.text(
        left, 1 - 0.12 / height, title, va="top", fontsize=13.5, fontweight="bold", color=INK
    )
    figure.text(left, 1 - 0.42 / height, device(rows), va="top", fontsize=9.5, color=SOFT)
    figure.text(left, 0.1 / height, below, va="bottom", fontsize=8.5, color=SOFT)
    return figure


def device(rows: Sequence[Row]) -> str:
    """The devices of the rows, each with its version of torch and its commits."""
    commits: dict[str, dict[str, None]] = {}
    for row in rows:
        commits.setdefault(_device(row), {})[str(row.machine.get("commit") or "")] = None
    return "; ".join(
        ", ".join([name, *(f"commit {commit}" for commit in known if commit)])
        for name, known in commits.items()
    )


def _device(row: Row) -> str:
    machine = row.machine
    words = [str(machine.get("device", "an unknown device"))]
    if machine.get("kind") == "cpu" and machine.get("threads"):
        words.append(f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}")
    if machine.get("torch"):
        words.append(f"torch {machine['torch']}")
    return ", ".join(words)


def plain(axes: Axes) -> None:
    """Draw a light grid behind the data and no box around it."""
    axes.set_axisbelow(True)
    axes.grid(True, which="major", color="#e3e3e3", linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9a9a9a")
    axes.tick_params(colors=INK, labelsize=9, which="both")


def legend(figure: Figure, peers: Iterable[str], more: Sequence[Artist] = ()) -> None:
    """Draw a legend beside the axes: peers in order, then ``more``."""
    handles = [
        Line2D(
            [], [], label=peer, color=look.color, marker=look.marker, markersize=look.size,
            linestyle=look.dash, linewidth=look.width,
        )
        for peer in dict.fromkeys(peers)
        for look in (style(peer),)
    ]  # fmt: skip
    figure.legend(
        handles=[*handles, *more],
        loc="outside right center",
        frameon=False,
        fontsize=9.5,
        handlelength=2.6,
    )


def logarithmic(axis: Axis, unit: str) -> None:
    """Label a logarithmic axis with units: "10 µs", "5 %"; call it after plotting the data."""
    low, high = sorted(axis.get_view_interval())
    few = low > 0 and high / low < 30
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    if unit == "s":
        axis.set_major_formatter(FuncFormatter(lambda value, _: _seconds(value)))
    else:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}{unit}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _seconds(value: float) -> str:
    scale, name = next((pair for pair in _UNITS if value >= 0.9995 * pair[0]), _UNITS[-1])
    return f"{value / scale:g} {name}"


def ticks(axis: Axis, values: Sequence[float], labels: Sequence[str] | None = None) -> None:
    """Set ticks at these values only."""
    axis.set_ticks(list(values), labels=None if labels is None else list(labels))
    axis.set_minor_locator(NullLocator())


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG; a reader of ``path`` never sees a half-written file."""
    # The Agg canvas is used directly: pyplot would change the caller's state and backend.
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    FigureCanvasAgg(figure).print_png(scratch)
    scratch.replace(path)
