"""The command ``python -m benchmarks learn``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.result_rows import RESULTS

FOLDER = RESULTS / "learning"


def learn(
    tasks: Annotated[
        str, typer.Option("--task", help="Tasks, separated by commas, or all.")
    ] = "all",
    methods: Annotated[
        str, typer.Option("--methods", help="Methods, separated by commas, or all.")
    ] = "all",
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds, separated by commas.")] = "0,1,2",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of one JSON Lines file per task.")
    ] = FOLDER,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Train four steps at one rate, to try the command.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing; write docs/learning.md from the results.")
    ] = False,
) -> None:
    """Train every method for the same number of steps, each at the best of its learning rates.

    A run with the same configuration in the results is not repeated.
    """
    # Imported here, since the other commands need none of these models.
    from benchmarks.learning.methods import METHODS
    from benchmarks.learning.run import run_method
    from benchmarks.learning.tasks import TASKS

    if report:
        from benchmarks.report.pages import write_learning_page

        typer.echo(f"wrote {write_learning_page(output)}")
        return
    if tiny and output.resolve() == FOLDER.resolve():
        raise typer.BadParameter("--tiny needs an --output other than the folder of full runs")
    for task in _selected(tasks, TASKS, "--task"):
        for method in _selected(methods, METHODS, "--methods"):
            short = {"rates": METHODS[method].rates[1:2], "steps": 4, "records": 8} if tiny else {}
            for result in run_method(
                TASKS[task],
                method,
                [int(seed) for seed in seeds.split(",")],
                output,
                **short,  # type: ignore[arg-type]
            ):
                plan = result["plan"]
                typer.echo(
                    f"{task} {method} lr {plan['rate']:g} seed {plan['seed']}: development "
                    f"{result['development'][-1]:.3f}, held out {result['heldout'][-1]:.3f}, "
                    f"{result['seconds']:.0f} s"
                )


def _selected(text: str, known: Collection[str], option: str) -> list[str]:
    names = list(known) if text == "all" else text.split(",")
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{option} takes {', '.join(known)} or all, got {name!r}")
    return names
