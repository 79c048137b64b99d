"""Options that several commands share."""

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
        "--adapter", "-a", help="Folder of a trained adapter. Default: the base model alone."
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Batch size per device.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Maximum tokens of a completion.")
]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1, …; auto uses a GPU if available.")
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="Data type of the base model: float32, bfloat16, float16; auto: as stored."
    ),
]
