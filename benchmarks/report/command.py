"""The command ``python -m benchmarks report``: a report with plots, or sections of other pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report.device_report import render_report
from benchmarks.report.tables import by_key
from benchmarks.result_rows import RESULTS, read
from benchmarks.run import stop


def write_report(
    folder: Annotated[
        Path, typer.Argument(help="Results of one device.", show_default="results/cpu")
    ] = RESULTS / "cpu",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the page and plots. Default: FOLDER/report.")
    ] = None,
    readme: Annotated[
        bool, typer.Option("--readme", help="Rewrite README's benchmark table, and nothing else.")
    ] = False,
    serving: Annotated[
        bool,
        typer.Option("--serving", help="Rewrite table and plot of docs/serving-cost.md only."),
    ] = False,
) -> None:
    """Write tables and plots of results, or with --readme the table in README.md."""
    from benchmarks.report import pages  # imports matplotlib, which other commands do not need
    from benchmarks.report.plots import draw

    try:
        rows = read(folder)
        by_key(rows)
        if readme or serving:
            written = pages.write_readme(rows) if readme else pages.write_serving_page(rows)
            typer.echo(f"table written to {written}")
            return
        report = output or (folder if folder.is_dir() else folder.parent) / "report"
        report.mkdir(parents=True, exist_ok=True)
        page = report / "report.md"
        page.write_text(render_report(rows), encoding="utf-8")  # the tables, even if a plot fails
        plots = draw(rows, report)
        page.write_text(render_report(rows, plots), encoding="utf-8")
    except (OSError, ValueError) as error:
        stop(str(error), 2)
    typer.echo(f"{page}: {len(rows)} rows, {len(plots)} plots")
