"""``reft presets``: list the published runs, show a run, copy a run to edit."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft.cli.errors import UserError, check_file

if TYPE_CHECKING:
    from rich.console import Console

    from reft.paper.presets import Preset, Published

app = typer.Typer(
    help="The published runs of the paper: list them, show a run, copy a run to edit.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[
    str, typer.Argument(help="A name of `reft presets list`, or a file.", metavar="NAME")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print every value as JSON.")]


@app.callback()
def _presets(context: typer.Context, as_json: AsJson = False) -> None:
    if context.invoked_subcommand is None:
        list_presets(as_json=as_json)
    elif as_json:
        raise UserError(
            f"--json must follow the command: reft presets {context.invoked_subcommand} --json"
        )


@app.command("list")
def list_presets(
    task: Annotated[
        str | None,
        typer.Option("--task", help="Only presets of this task: commonsense, glue, glue/cola."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Only presets whose model name contains this text."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the published runs."""
    selected = _select(task, model)
    if as_json:
        text = json.dumps([preset.to_dict() for preset in selected], indent=1, ensure_ascii=False)
        typer.echo(text)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("preset", no_wrap=True)
    table.add_column("intervention", no_wrap=True)
    for column in ("trained, %", "paper"):
        table.add_column(column, justify="right", no_wrap=True)
    for preset in selected:
        published = preset.published
        table.add_row(
            preset.name,
            preset.config["intervention"],
            _text(published.percent),
            _text(published.average),
        )
    console = _console()
    console.print(table)
    console.print(
        f"\n{len(selected)} presets; paper: the published average, in percent\n"
        "reft presets show NAME shows all settings"
    )


@app.command("show")
def show(name: Name, as_json: AsJson = False) -> None:
    """Show a preset: its settings and their sources, its published results, its command."""
    from reft.paper.presets import load
    from reft.paper.presets.preset import SETTINGS

    preset = load(name)
    if as_json:
        typer.echo(json.dumps(preset.to_dict(), indent=1, ensure_ascii=False))
        return
    from rich.table import Table
    from rich.text import Text

    console, values = _console(), preset.to_dict()
    console.print(Text(f"{preset.name}: {preset.title}", style="bold"))
    console.print(f"{preset.method} of {preset.model}, task {preset.task}\n", markup=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("known from", no_wrap=True)
    rows = {"hub_id": preset.hub_id}
    for section in SETTINGS:
        rows |= {f"{section}.{field}": value for field, value in values[section].items()}
    sources: dict[str, int] = {}
    for field, value in rows.items():
        cell = ""
        # A setting that the run does not use needs no source.
        if value is not None:
            origin = preset.known_from(field)
            cell = f"{origin.status} [{sources.setdefault(origin.source, len(sources) + 1)}]"
        table.add_row(field, Text(_text(value) or "none"), Text(cell))
    console.print(table)
    console.print()
    for source, number in sources.items():
        console.print(Text(f"[{number}] {source}"))
    console.print("\n" + "\n".join(_published(preset)), markup=False)
    console.print(f"\nRun it:  {_command(name, preset)}", markup=False, soft_wrap=True)
    console.print("Data sets are read from --data FOLDER, by default from the hub.")


@app.command("copy")
def copy(
    name: Name,
    file: Annotated[Path, typer.Argument(help="File of the copy, *.toml.", metavar="FILE")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
) -> None:
    """Copy a preset with all its settings to a TOML file, to edit and run with --preset FILE."""
    from reft.io.atomic_write import write_whole
    from reft.paper.presets import load, to_toml

    if file.suffix != ".toml":
        raise UserError(f"the copy must be a file *.toml, got {file}")
    check_file(file)
    if file.exists() and not overwrite:
        raise UserError(f"{file} exists already; --overwrite replaces it")
    text = to_toml(load(name))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text)
    typer.echo(f"{name} written to {file}")


def _select(task: str | None, model: str | None) -> list[Preset]:
    """Return the presets of a task and of models; raise UserError if there are none."""
    from reft.field_checks import did_you_mean
    from reft.paper.presets import load, names

    presets = [load(name) for name in names()]
    if task is not None:
        known = {part for preset in presets for part in (preset.task, preset.task.split("/")[0])}
        if task not in known:
            raise UserError(
                f"no preset of a task {task!r}{did_you_mean(task, known)}; tasks are "
                f"{', '.join(sorted(known))}"
            )
        presets = [preset for preset in presets if task in (preset.task, preset.task.split("/")[0])]
    if model is not None:
        models = dict.fromkeys(preset.model for preset in presets)
        presets = [
            preset
            for preset in presets
            if model.lower() in f"{preset.model}\n{preset.hub_id}\n{preset.name}".lower()
        ]
        if not presets:
            raise UserError(
                f"no preset of a model {model!r}{did_you_mean(model, models)}; models are "
                f"{', '.join(models)}"
            )
    return presets


def _published(preset: Preset) -> list[str]:
    """Describe the published results in lines."""
    published: Published = preset.published
    where = f"Published (Table {published.table})" if published.table else "Published"
    rows = [f"{name} {score}{_sd(published, name)}" for name, score in published.scores.items()]
    if published.average is not None and len(rows) != 1:
        rows.append(f"average {published.average}{_sd(published, 'average')}")
    lines = [f"{where}: {', '.join(rows) or 'no score'}"]
    if published.params is not None:
        percent = (
            "" if published.percent is None else f", {_text(published.percent)} % of the model"
        )
        lines.append(f"Trained: {published.params:,} parameters{percent}")
    return lines + ([f"Note: {published.note}"] if published.note else [])


def _sd(published: Published, name: str) -> str:
    return f" ± {published.sd[name]}" if name in published.sd else ""


def _command(name: str, preset: Preset) -> str:
    return shlex.join(
        ["reft", "train", "--preset", name, "--output", f"runs/{preset.name.replace('/', '-')}"]
    )


def _text(value: object) -> str:
    """Format a value as for --set; "" for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def _console() -> Console:
    """Make a console for stdout, at least 80 columns wide if stdout is not a terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    return (
        console if console.is_terminal else Console(highlight=False, width=max(80, console.width))
    )
