"""``reft generate``: print completions of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft.cli import options
from reft.cli.errors import UserError, check_file


def generate(
    model: options.Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt to complete.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="JSON or JSONL with a 'prompt' in each record."),
    ] = None,
    adapter: options.Adapter = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="JSONL file for prompts and completions; default: print."
        ),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 64,
    batch_size: options.BatchSize = 8,
    temperature: Annotated[
        float,
        typer.Option("--temperature", min=0.0, help="Sampling temperature; 0 for greedy decoding."),
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Random seed of sampling.")] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Complete one prompt, or every prompt of a file."""
    import json

    from rich.console import Console

    from reft.cli.loading import check_model_name, load_model
    from reft.io.atomic_write import write_whole
    from reft.train.evaluate import generate_completions
    from reft.train.records import read_records

    if (prompt is None) == (data is None):
        raise UserError("give either --prompt or --data")
    if data is not None:
        records = read_records(data, required=("prompt",), optional=("completion",))
        prompts = [record["prompt"] for record in records]
    else:
        prompts = [str(prompt)]
    if output is not None:
        check_file(output)
    check_model_name(model)
    wrapped, tokenizer = load_model(model, adapter, dtype=dtype, device=device)
    sampling = {}
    if temperature:
        import torch

        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature}
    completions = generate_completions(
        wrapped,
        tokenizer,
        prompts,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        console=Console(stderr=True),
        **sampling,
    )
    if output is None:
        for completion in completions:
            typer.echo(completion)
        return
    lines = [
        json.dumps({"prompt": text, "completion": completion}, ensure_ascii=False) + "\n"
        for text, completion in zip(prompts, completions, strict=True)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, "".join(lines))
    typer.echo(f"wrote {len(lines)} completions to {output}", err=True)
