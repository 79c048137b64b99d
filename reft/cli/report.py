"""``reft report``: what the runs in a folder scored, beside what was published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from reft.cli.errors import check_folder


def report(
    folder: Annotated[
        Path, typer.Argument(help="Of runs that `reft train --preset` made.", metavar="DIR")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Write DIR/report.md with tables and DIR/report/*.png with plots, and print the tables.

    A number of the paper is shown beside a run's own, with whatever was not as published. What was
    not run is not shown.
    """
    from reft.io.atomic_write import write_whole
    from reft.paper.runs.collect import collect
    from reft.paper.runs.report import markdown, plot_path, summary

    groups, unfinished = collect(folder)
    check_folder(folder)
    if as_json:
        typer.echo(json.dumps([summary(group) for group in groups], indent=1, ensure_ascii=False))
        return
    from reft.paper.runs.plot import plot_group

    for group in groups:
        plot_group(group, folder / plot_path(group))
    text = markdown(groups, unfinished, folder)
    write_whole(folder / "report.md", text)
    typer.echo(text, nl=False)
