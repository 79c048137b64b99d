"""``reft evaluate``: exact match of greedy completions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft.cli import options
from reft.cli.errors import check_file


def evaluate(
    model: options.Model,
    data: Annotated[
        Path,
        typer.Option("--data", "-d", help="JSON or JSONL with 'prompt' and 'completion'."),
    ],
    adapter: options.Adapter = None,
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", "-o", help="Write every prediction there as JSONL."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first so many records.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = 64,
    batch_size: options.BatchSize = 8,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Complete the prompts of a file and count exact matches (but for white space)."""
    from rich.console import Console

    from reft.cli.loading import check_model_name, load_model
    from reft.train.evaluate import evaluate as evaluate_records
    from reft.train.records import read_records

    records = read_records(data)[:limit]
    if predictions is not None:
        check_file(predictions)
    check_model_name(model)
    wrapped, tokenizer = load_model(model, adapter, dtype=dtype, device=device)
    result = evaluate_records(
        wrapped,
        tokenizer,
        records,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        console=Console(stderr=True),
    )
    if predictions is not None:
        predictions.parent.mkdir(parents=True, exist_ok=True)
        result.write(predictions)
    typer.echo(f"exact match {result.score:.4f} ({result.correct} of {len(result.predictions)})")
