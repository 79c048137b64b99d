"""Markdown tables of the scores of runs beside the published ones."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reft.paper.runs.collect import Group


def markdown(groups: Sequence[Group], unfinished: Sequence[Path], root: Path) -> str:
    """Write the report: a table of all groups, then a table and a plot for each group.

    Published scores are shown for comparison. Lines below a table list the settings that differ
    from the published run.
    """
    parts = ["# Runs", ""]
    parts += table(
        ["preset", "model", "seeds", "trainable, %", "average", "paper"],
        [
            [
                group.preset.name,
                group.model,
                ", ".join(map(str, group.seeds)),
                f"{group.runs[0]['parameters']['percent']:.4f}",
                average(group),
                _number(group.preset.published.average),
            ]
            for group in groups
        ],
    )
    for group in groups:
        parts += ["", f"## {group.preset.name} on {group.model}", ""]
        parts += details(group)
        parts += ["", f"![{group.preset.name}]({plot_path(group)})"]
    if unfinished:
        parts += ["", "## Not finished", ""]
        parts += [f"- {path.relative_to(root)}" for path in unfinished]
    return "\n".join(parts) + "\n"


def details(group: Group) -> list[str]:
    """Describe the scores of a group for each set, and differences from the paper's run."""
    lines = []
    cells = group.cells
    if cells:
        rows = [
            [
                cell.name,
                f"{cell.mean:.1f}",
                "" if cell.sd is None else f"{cell.sd:.1f}",
                _number(cell.published),
                "" if cell.difference is None else f"{cell.difference:+.1f}",
            ]
            for cell in cells
        ]
        lines += table(["set", "score", "SD", "paper", "difference"], rows)
    else:
        lines += ["Not scored: these answers need a judge, see `answers/` of each run."]
    runs = group.runs
    speed = statistics.fmean(run["training"]["tokens_per_second"] for run in runs)
    seconds = statistics.fmean(run["training"]["seconds"] for run in runs)
    peak = max(run["training"]["memory"]["bytes"] for run in runs)
    first = runs[0]["training"]
    cost = (
        f"{len(runs)} run{'s' if len(runs) > 1 else ''} of {first['steps']} steps; in training "
        f"{seconds:.0f} s, {speed:.0f} tokens/s, peak memory {peak / 2**30:.2f} GiB "
        f"({first['memory']['of']})."
    )
    lines += ["", cost]
    caveats = group.caveats
    if caveats:
        lines += ["", "Not the paper's run:", "", *[f"- {caveat}" for caveat in caveats]]
    return lines


def average(group: Group) -> str:
    """Format mean and standard deviation of the average score; "not scored" without it."""
    averages = [cell for cell in group.cells if cell.name == "average"]
    if not averages:
        return "not scored"
    [cell] = averages
    return f"{cell.mean:.1f}" + ("" if cell.sd is None else f" ± {cell.sd:.1f}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format a Markdown table with aligned columns."""
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]


def plot_path(group: Group) -> str:
    """Return the path of a group's plot, relative to the folder of the report."""
    text = f"{group.preset.name}-on-{group.model}-{group.key}"
    return f"report/{re.sub(r'[^A-Za-z0-9.]+', '-', text).strip('-.')}.png"


def summary(group: Group) -> dict[str, Any]:
    """Return the scores of a group as JSON values."""
    return {
        "preset": group.preset.name,
        "model": group.model,
        "seeds": list(group.seeds),
        "parameters": group.runs[0]["parameters"],
        "scores": {
            cell.name: {"mean": cell.mean, "sd": cell.sd, "published": cell.published}
            for cell in group.cells
        },
        "published": group.preset.to_dict()["published"],
        "caveats": group.caveats,
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
