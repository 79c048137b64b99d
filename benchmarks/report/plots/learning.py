"""Held-out score over optimizer steps, a line per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.learning.methods import FAMILY, METHODS
from benchmarks.learning.results import MethodResults
from benchmarks.learning.tables import untrained_score
from benchmarks.learning.tasks import TASKS

#: Paul Tol's "bright" colours, which are safe for colour-blind readers, and a sixth.
_COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377")


def learning_plot(tasks: Mapping[str, Sequence[MethodResults]]) -> Figure:
    """Two panels per task: LoReFT beside the other methods, and the six members of the family."""
    figure = Figure(figsize=(12, 4.6 * len(tasks)), dpi=110, layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for (task, methods), (left, right) in zip(tasks.items(), axes, strict=True):
        members = [results for results in methods if results.method in FAMILY]
        others = [results for results in methods if results.method not in FAMILY]
        loreft = [results for results in members if results.method == "loreft"]
        untrained = untrained_score(methods)
        _panel(left, [*loreft, *others], untrained)
        _panel(right, members, untrained)
        left.set_title(f"{task}: LoReFT and other methods", fontsize=11)
        right.set_title(f"{task}: the six members of the family", fontsize=11)
        for panel in (left, right):
            panel.set_xlabel(f"optimizer steps of {TASKS[task].batch_size} records")
    return figure


def _panel(axes: Axes, methods: Sequence[MethodResults], untrained: float) -> None:
    for results, colour in zip(methods, _COLOURS, strict=False):
        steps, means, deviations = zip(*results.curve, strict=True)
        axes.plot(
            steps, means, color=colour, marker="o", markersize=3.5,
            label=f"{METHODS[results.method].title} ({results.trainable:,})",
        )  # fmt: skip
        low = [m - d for m, d in zip(means, deviations, strict=True)]
        high = [m + d for m, d in zip(means, deviations, strict=True)]
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(untrained, color="black", linestyle=":", linewidth=1, label="base, untrained")
    axes.set_ylabel("held-out score, %")
    axes.set_ylim(-2, 102)
    axes.grid(True, alpha=0.3)
    axes.legend(title="method (trainable parameters)", fontsize=8, title_fontsize=8)
