"""``reft evaluate``: exact match of greedy completions, with and without the adapter."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft.cli import options
from reft.cli.errors import UserError, check_file

if TYPE_CHECKING:
    from reft.train.evaluate import Evaluation


def evaluate(
    model: options.Model,
    data: Annotated[
        Path,
        typer.Option("--data", "-d", help="JSON or JSONL with 'prompt' and 'completion'."),
    ],
    adapter: options.Adapter = None,
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", "-o", help="JSONL file for the predictions."),
    ] = None,
    no_base: Annotated[
        bool,
        typer.Option("--no-base", help="Do not evaluate the base model without the adapter."),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Evaluate only this many records from the start."),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 64,
    batch_size: options.BatchSize = 8,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Complete the prompts of a file and count exact matches, ignoring white space at the ends, of
    an adapter and of its base model."""
    from rich.console import Console

    from reft.cli.loading import check_model_name, load_model
    from reft.train.evaluate import evaluate as evaluate_records
    from reft.train.records import read_records

    if no_base and adapter is None:
        raise UserError("--no-base goes with --adapter")
    records = read_records(data)[:limit]
    if predictions is not None:
        check_file(predictions)
    check_model_name(model)
    wrapped, tokenizer = load_model(model, adapter, dtype=dtype, device=device)
    measure = partial(
        evaluate_records,
        wrapped,
        tokenizer,
        records,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        console=Console(stderr=True),
    )
    result, base = measure(), None
    if adapter is not None and not no_base:
        with wrapped.disable_adapter():
            base = measure()
    if predictions is not None:
        predictions.parent.mkdir(parents=True, exist_ok=True)
        result.write(predictions, base)
    typer.echo(_score(result))
    if base is not None:
        typer.echo(f"its base: {_score(base)}")
        if result.correct <= base.correct:
            compared = "worse than" if result.correct < base.correct else "no better than"
            typer.echo(f"the adapter is {compared} its base on these records")


def _score(result: Evaluation) -> str:
    return f"exact match {result.score:.4f} ({result.correct} of {len(result.predictions)})"
