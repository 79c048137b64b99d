"""``python -m benchmarks learn``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.result_rows import RESULTS

FOLDER = RESULTS / "learning"


def learn(
    tasks: Annotated[str, typer.Option("--task", help="all, or names with commas")] = "all",
    methods: Annotated[str, typer.Option("--methods", help="all, or names with commas")] = "all",
    seeds: Annotated[str, typer.Option("--seeds")] = "0,1,2",
    output: Annotated[Path, typer.Option("--output", "-o", help="One JSON file a run.")] = FOLDER,
    tiny: Annotated[bool, typer.Option("--tiny", help="Four steps, one rate: to try it.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing; write docs/learning.md from the files.")
    ] = False,
) -> None:
    """Let methods learn the same tasks at equal steps, each with the best of its learning rates.

    A run whose file is there, with the same configuration, is not done again.
    """
    # Here: every other command would wait for the models that these import.
    from benchmarks.learning.methods import METHODS
    from benchmarks.learning.run import run_method
    from benchmarks.learning.tasks import TASKS

    if report:
        from benchmarks.report.pages import write_page

        typer.echo(f"wrote {write_page(output)}")
        return
    if tiny and output.resolve() == FOLDER.resolve():
        raise typer.BadParameter("--tiny needs an --output of its own, not that of whole runs")
    for name in _chosen(tasks, TASKS, "--task"):
        for method in _chosen(methods, METHODS, "--methods"):
            short = {"rates": METHODS[method].rates[1:2], "steps": 4, "records": 8} if tiny else {}
            for result in run_method(
                TASKS[name],
                method,
                [int(seed) for seed in seeds.split(",")],
                output,
                **short,  # type: ignore[arg-type]
            ):
                plan = result["plan"]
                typer.echo(
                    f"{name} {method} lr {plan['rate']:g} seed {plan['seed']}: development "
                    f"{result['development'][-1]:.3f}, held out {result['heldout'][-1]:.3f}, "
                    f"{result['seconds']:.0f} s"
                )


def _chosen(text: str, known: Collection[str], option: str) -> list[str]:
    names = list(known) if text == "all" else text.split(",")
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{option} must be of {', '.join(known)}; got {name!r}")
    return names
