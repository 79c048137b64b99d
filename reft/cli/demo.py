"""``reft demo``: a small task from training to reloading, offline on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft.cli.errors import check_folder


def demo(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder of the adapter, the results and the plots."),
    ] = Path("reft-demo"),
    encoder: Annotated[
        bool,
        typer.Option(
            "--encoder", help="Use an encoder with a classifier instead of a language model."
        ),
    ] = False,
) -> None:
    """Train, evaluate, save and reload an adapter of a small model."""
    check_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    from reft.demo.report import GoalsMissed

    try:
        if encoder:
            from reft.demo import encoder as encoder_demo

            encoder_demo.run(output)
        else:
            from reft.demo import causal as causal_demo

            causal_demo.run(output)
    except GoalsMissed as error:
        typer.echo(f"Error: the demo finished but missed its goals: {error}", err=True)
        raise typer.Exit(1) from None
