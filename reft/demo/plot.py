"""Plot of the loss curve."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reft.io.atomic_write import write_whole


def loss_curve(
    path: str | os.PathLike[str],
    steps: Sequence[int],
    losses: Sequence[float],
    *,
    title: str,
    every: int = 1,
) -> None:
    """Write a PNG of the training loss over optimizer steps, on a logarithmic scale.

    Args:
        path: the PNG, replaced atomically.
        steps: optimizer steps, ascending.
        losses: the loss at each step, positive.
        title: title of the plot.
        every: number of steps that each loss is averaged over, for the label of the axis.

    Raises:
        ValueError: there is no point, or the numbers of losses and steps differ.
    """
    if not steps or len(steps) != len(losses):
        raise ValueError(
            f"steps and losses must be equally many, at least 1; got {len(steps)} and {len(losses)}"
        )
    # pyplot is avoided, because it has global state and chooses a window system.
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#1f5fa8", linewidth=1.8, marker="o", markersize=3)
    axes.set_yscale("log")
    axes.set_xlim(0, max(steps) * 1.02)
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss" + (f", mean of {every} steps" if every > 1 else ""))
    axes.grid(True, which="major", alpha=0.4)
    axes.grid(True, which="minor", axis="y", alpha=0.15)
    target = Path(path)
    picture = io.BytesIO()
    canvas.print_png(picture)
    write_whole(target, picture.getvalue())
