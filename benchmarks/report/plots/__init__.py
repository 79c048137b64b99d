"""Results as pictures: whatever there are rows for is drawn, the rest is skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.report.plots.edit import bandwidth, orthonormal, work
from benchmarks.report.plots.frame import FLOORS
from benchmarks.report.plots.steps import overheads, sweeps
from benchmarks.report.tables import in_order, most_exact
from benchmarks.result_rows import Row


def draw(rows: Sequence[Row], folder: Path) -> list[str]:
    """Write a PNG of every plot that has rows.

    Returns:
        Names of the files, in the order of a page.
    """
    made = []
    for name, figure in figures(in_order(row for row in rows if row.value is not None)):
        # Not pyplot: its state and its choice of a window system belong to whoever calls this.
        beside = folder / f".{name}.{os.getpid()}.tmp"
        FigureCanvasAgg(figure).print_png(beside)
        beside.replace(folder / name)
        made.append(name)
    return made


def figures(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """File name and figure of every plot that ``rows``, all with numbers, suffice for."""
    op = [row for row in rows if row.suite == "op" and row.bytes and row.flops and row.value]
    for prefix, how in (("", ""), ("graph_", ", from CUDA graphs")):
        own = [r for r in op if r.metric in (f"{prefix}forward", f"{prefix}backward")]
        suffix = f"-{prefix.removesuffix('_')}" if prefix else ""
        if any(row.share for row in own):
            yield f"bandwidth{suffix}.png", bandwidth(own, how)
        if own:
            yield f"op{suffix}.png", work(own, how)
    turned = [row for row in rows if row.suite == "orthonormal" and row.unit == "s"]
    if turned:
        yield "orthonormal.png", orthonormal(turned)
    for suite in ("layer", "step"):
        own = most_exact(row for row in rows if row.suite == suite)
        whole = [row for row in own if row.ratio is not None]
        whole = [row for row in whole if row.shape.get("sweep") is None]
        if any(row.peer not in FLOORS for row in whole):
            yield f"{suite}.png", overheads(whole)
    own = most_exact(row for row in rows if row.suite == "step")
    swept = [row for row in own if row.shape.get("sweep")]
    swept = [row for row in swept if row.ratio is not None and row.peer != row.baseline]
    families: dict[tuple[str, str], list[Row]] = {}
    for row in swept:
        families.setdefault((row.shape["model"], row.shape["dtype"]), []).append(row)
    for number, own in enumerate(families.values()):
        yield f"sweeps{f'-{number + 1}' if number else ''}.png", sweeps(own)
