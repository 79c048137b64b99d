"""Options that several commands share, with one wording."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Folder of the base model, or its name on the hub.", metavar="MODEL"
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter", "-a", help="Folder of a trained adapter. Without one, the base model alone."
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Sequences at a time.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="The most tokens of a completion.")
]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1, …; auto takes a GPU if there is one.")
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="Of the base model: float32, bfloat16, float16; auto as stored."),
]
