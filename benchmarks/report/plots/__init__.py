"""Plots of result rows; a plot without rows is skipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.report.plots.edit import bandwidth_plot, orthonormal_plot, time_plot
from benchmarks.report.plots.frame import BASELINES, save_figure
from benchmarks.report.plots.steps import overhead_plot, sweep_plot
from benchmarks.report.tables import in_order, overhead_rows
from benchmarks.result_rows import Row


def draw(rows: Sequence[Row], folder: Path) -> list[str]:
    """Write every plot that has rows as a PNG.

    Returns:
        The names of the files, in the order of the report.
    """
    names = []
    for name, figure in figures(in_order(row for row in rows if row.value is not None)):
        save_figure(figure, folder / name)
        names.append(name)
    return names


def figures(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """Yield file name and figure of every plot that has rows; all rows must have a number."""
    yield from _op_figures(rows)
    orthonormal = [row for row in rows if row.suite == "orthonormal" and row.unit == "s"]
    if orthonormal:
        yield "orthonormal.png", orthonormal_plot(orthonormal)
    for suite in ("layer", "step"):
        steps = overhead_rows(row for row in rows if row.suite == suite)
        models = [row for row in steps if row.ratio is not None and not row.shape.get("sweep")]
        if any(row.peer not in BASELINES for row in models):
            yield f"{suite}.png", overhead_plot(models)
    families: dict[tuple[str, str], list[Row]] = {}
    for row in overhead_rows(row for row in rows if row.suite == "step" and row.shape.get("sweep")):
        if row.ratio is not None and row.peer != row.baseline:
            families.setdefault((row.shape["model"], row.shape["dtype"]), []).append(row)
    for number, family in enumerate(families.values()):
        yield f"sweeps{f'-{number + 1}' if number else ''}.png", sweep_plot(family)


def _op_figures(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """Bandwidth and time of the edit: from eager calls, and from CUDA graphs."""
    op = [row for row in rows if row.suite == "op" and row.bytes and row.flops and row.value]
    for prefix, suffix, how in (("", "", ""), ("graph_", "-graph", ", from CUDA graphs")):
        phases = [row for row in op if row.metric in (f"{prefix}forward", f"{prefix}backward")]
        if any(row.share for row in phases):
            yield f"bandwidth{suffix}.png", bandwidth_plot(phases, how)
        if phases:
            yield f"op{suffix}.png", time_plot(phases, how)
