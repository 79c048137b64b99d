"""``reft convert``: convert adapters of other libraries to reft, and reft adapters to pyreft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reft.cli.errors import UserError, check_folder


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help="Adapter folder of pyreft, adapters or reft."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the result.")],
    to: Annotated[str, typer.Option("--to", help="Format of the result: reft or pyreft.")] = "reft",
    positions: Annotated[
        str | None,
        typer.Option(
            "--positions", help="f7+l7, f3, l1, …; required for pyreft, which does not store them."
        ),
    ] = None,
    intervention: Annotated[
        str | None,
        typer.Option(
            "--intervention", help="loreft, direft, noreft, …, if the folder does not determine it."
        ),
    ] = None,
    activation: Annotated[
        str | None, typer.Option("--activation", help="pyreft's act_fn: relu, gelu, …")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option("--dropout", help="Dropout in further training, in [0, 1).")
    ] = None,
    dropout_on: Annotated[
        str | None, typer.Option("--dropout-on", help="row (as in both libraries) or delta.")
    ] = None,
    short_prompts: Annotated[
        str | None, typer.Option("--short-prompts", help="pyreft (default) or paper.")
    ] = None,
    prompt_end: Annotated[
        str | None, typer.Option("--prompt-end", help="last (default) or second_to_last.")
    ] = None,
    block_path: Annotated[
        str | None,
        typer.Option("--block-path", help="Path of the base model's blocks, such as model.layers."),
    ] = None,
    head: Annotated[
        bool | None,
        typer.Option(
            "--head/--no-head", help="Convert a trained head too; default: pyreft yes, adapters no."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the adapter in OUT.")
    ] = False,
) -> None:
    """Convert an adapter. The base model is not needed."""
    from reft.interop.folders import READER_KEYWORDS, READERS, WRITERS, kind_of

    if to not in WRITERS:
        raise UserError(f"--to must be one of {', '.join(WRITERS)}; got {to!r}")
    kind = kind_of(source)
    if kind == to:
        raise UserError(f"{source} is already a folder of {to}")
    given: dict[str, Any] = {
        "positions": positions,
        "intervention": intervention,
        "activation": activation,
        "dropout": dropout,
        "dropout_on": dropout_on,
        "short_prompts": short_prompts,
        "prompt_end": prompt_end,
        "block_path": block_path,
        "head": head,
    }
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if name not in READER_KEYWORDS[kind]:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} cannot be given for a folder of {kind}, got {options[name]!r}")
    if kind == "pyreft":
        if "positions" not in options:
            raise UserError("--positions must be given: pyreft does not store them")
        options.setdefault("dropout_on", "row")
    _check_output(output, overwrite=overwrite)
    check_folder(output)
    converted = READERS[kind](source, **options)
    WRITERS[to](output, converted)
    config, shape = converted.config, converted.tensors["rotation"].shape
    typer.echo(
        f"{kind} to {to}: {config.intervention}, {shape[0]} layers, rank {config.rank}, width "
        f"{shape[-1]}, positions {config.positions}, {'tied' if shape[1] == 1 else 'untied'}; "
        f"written to {output}"
    )
    if to == "pyreft":
        typer.echo(
            f"pyreft does not store positions ({config.positions}), activation "
            f"({config.activation}) and dropout ({config.dropout:g}): pass them to pyreft again"
        )


def _check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that holds other files, or an adapter without ``overwrite``."""
    from reft.io.adapter_files import WEIGHTS_FILE

    if not output.is_dir() or not any(output.iterdir()):
        return
    if not (output / WEIGHTS_FILE).exists():
        raise UserError(f"{output} must be a new, empty or adapter folder; it holds other files")
    if not overwrite:
        raise UserError(f"{output} holds an adapter already; --overwrite replaces it")
