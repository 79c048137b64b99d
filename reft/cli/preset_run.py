"""``reft train --preset``: run a preset once for each seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from reft.cli.errors import UserError, check_folder

#: Options of ``reft train`` that may be combined with --preset.
_COMBINABLE = (
    "preset",
    "settings",
    "seeds",
    "model",
    "data",
    "output",
    "resume",
    "overwrite",
    "device",
)


def refuse_other_options(context: typer.Context) -> None:
    """Refuse options for settings that the preset holds."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in _COMBINABLE and source is not None and source.name == "COMMANDLINE":
            option = parameter.opts[0]
            raise UserError(
                f"{option} cannot be combined with --preset; change settings with --set "
                "(`reft presets show NAME` lists them)"
            )


def refuse_preset_options(settings: Sequence[str], seeds: str | None) -> None:
    """Refuse options that need --preset."""
    for option, value in (("--set", settings), ("--seeds", seeds)):
        if value:
            raise UserError(f"{option} needs --preset")


def run_preset(
    name: str,
    settings: Sequence[str],
    seeds: str | None,
    *,
    model: str | None,
    data: Path | None,
    output: Path | None,
    resume: bool,
    overwrite: bool,
    device: str,
) -> None:
    """Run a preset once for each seed, and print its scores beside the published ones."""
    from reft.paper import presets

    preset = presets.override(presets.load(name), list(settings))
    chosen_seeds = preset.train.seeds if seeds is None else _numbers(seeds)
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    output = output or Path("runs") / preset.name
    check_folder(output)
    where = model if model is not None else preset.hub_id

    from rich.console import Console

    from reft.cli.loading import check_model_name, load_base, resolve_device
    from reft.paper.runs.collect import collect
    from reft.paper.runs.report import average, details
    from reft.paper.runs.run import run
    from reft.paper.tasks import ClassificationTask, get_task
    from reft.train.trainer import require_accelerate

    require_accelerate()
    check_model_name(where)
    task = get_task(preset.task)
    num_labels = max(1, len(task.labels)) if isinstance(task, ClassificationTask) else None
    target = resolve_device(device)
    dtype = preset.train.dtype
    if dtype == "auto":
        dtype = "bfloat16" if target.type == "cuda" else "float32"

    def make_base() -> tuple[Any, Any]:
        return load_base(where, dtype=dtype, device=str(target), num_labels=num_labels)

    console = Console(stderr=True)
    for seed in chosen_seeds:
        run(
            preset,
            make_base,
            data,
            output,
            model_name=where,
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            console=console,
        )
    for group in collect(output)[0]:
        typer.echo(f"{group.preset.name} on {group.model}: average {average(group)}\n")
        typer.echo("\n".join(details(group)))


def _numbers(text: str) -> tuple[int, ...]:
    """Parse the seeds of ``--seeds 42,43``."""
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--seeds must be integers such as 42,43,44; got {text!r}") from None
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds must be different integers of at least 0, got {text!r}")
    return seeds
