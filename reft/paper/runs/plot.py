"""Plot of a group of runs: loss curves, and scores beside the published ones."""

from __future__ import annotations

import io
import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reft.io.atomic_write import write_whole
from reft.paper.runs.collect import Group, curves

_OURS, _PAPER = "#1f5fa8", "#d1742b"


def plot_group(group: Group, path: str | os.PathLike[str]) -> None:
    """Write a PNG atomically: loss curves on the left, mean scores with standard deviation and the
    published scores on the right."""
    figure = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for seed, steps, losses in curves(group):
        left.plot(steps, losses, linewidth=1.4, label=f"seed {seed}")
    left.set_xlabel("optimizer step")
    left.set_ylabel("training loss")
    left.grid(True, alpha=0.3)
    left.legend(fontsize=8)
    cells = group.cells
    if cells:
        bars = range(len(cells))
        right.bar(
            bars,
            [cell.mean for cell in cells],
            yerr=[cell.sd or 0.0 for cell in cells],
            color=_OURS,
            alpha=0.8,
            capsize=3,
            label=f"this model, {len(group.runs)} run{'s' if len(group.runs) > 1 else ''}",
        )
        known = [
            (at, cell.published) for at, cell in enumerate(cells) if cell.published is not None
        ]
        if known:
            right.plot(
                *zip(*known, strict=True),
                linestyle="none",
                marker="_",
                markersize=22,
                markeredgewidth=2.5,
                color=_PAPER,
                label=f"paper, {group.preset.model}",
            )
        right.set_xticks(list(bars), [cell.name for cell in cells], rotation=35, ha="right")
        right.set_ylabel("score, %")
        right.grid(True, axis="y", alpha=0.3)
        right.legend(fontsize=8)
    else:
        right.axis("off")
        right.text(0.5, 0.5, "not scored: a judge is needed", ha="center")
    figure.suptitle(f"{group.preset.name} on {group.model}", fontsize=11)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    canvas.print_png(picture)
    write_whole(target, picture.getvalue())
