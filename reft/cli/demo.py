"""``reft demo``: a small task from beginning to end, on this machine, without the network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft.cli.errors import check_folder


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where adapter, results and plots go.")
    ] = Path("reft-demo"),
    encoder: Annotated[
        bool, typer.Option("--encoder", help="An encoder with a classifier, not a language model.")
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
        typer.echo(f"Error: the demo ran, but not as promised: {error}", err=True)
        raise typer.Exit(1) from None
