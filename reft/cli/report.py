"""``reft report``: scores of the runs in a folder beside the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from reft.cli.errors import check_folder


def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder of runs of `reft train --preset`.", metavar="DIR")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Write tables to DIR/report.md and plots to DIR/report/*.png, and print the tables.

    Scores of the paper are shown beside the scores of the runs, with the settings that differ.
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
