"""Held-out score over steps, one line a method."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.learning.methods import FAMILY, METHODS
from benchmarks.learning.tables import Learnt, untrained
from benchmarks.learning.tasks import TASKS

#: Paul Tol's bright colours, which people tell apart who see fewer, and one more.
_COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377")


def plot(tables: Mapping[str, Sequence[Learnt]], path: Path) -> None:
    """Write a PNG: for each task LoReFT beside the other methods, and the six members."""
    figure = Figure(figsize=(12, 4.6 * len(tables)), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(tables), 2, squeeze=False)
    for (task, learnt), (left, right) in zip(tables.items(), axes, strict=True):
        others = [one for one in learnt if one.method == "loreft" or one.method not in FAMILY]
        members = [one for one in learnt if one.method in FAMILY]
        for panel, shown, what in (
            (left, others, "LoReFT and other methods"),
            (right, members, "the six members of the family"),
        ):
            for one, colour in zip(shown, _COLOURS, strict=False):
                steps, means, deviations = zip(*one.curve, strict=True)
                title = METHODS[one.method].title
                panel.plot(
                    steps, means, color=colour, marker="o", markersize=3.5,
                    label=f"{title} ({one.trained:,})",
                )  # fmt: skip
                low = [m - d for m, d in zip(means, deviations, strict=True)]
                high = [m + d for m, d in zip(means, deviations, strict=True)]
                panel.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            panel.axhline(
                untrained(learnt),
                color="black",
                linestyle=":",
                linewidth=1,
                label="base, untrained",
            )
            panel.set_title(f"{task}: {what}", fontsize=11)
            panel.set_xlabel(f"optimizer steps of {TASKS[task].batch_size} records")
            panel.set_ylabel("held-out score, %")
            panel.set_ylim(-2, 102)
            panel.grid(True, alpha=0.3)
            panel.legend(title="method (trained parameters)", fontsize=8, title_fontsize=8)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    canvas.print_png(beside)
    beside.replace(path)
