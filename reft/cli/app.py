"""The ``reft`` command and its subcommands.

Commands import heavy modules when they run, so that ``reft --help`` is fast.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from reft.cli import convert, demo, evaluate, generate, presets, report, train
from reft.cli.errors import UserError, one_line
from reft.cli.ranks import refuse_several

app = typer.Typer(
    name="reft",
    help="Representation finetuning: train and use ReFT adapters of Hugging Face models.",
    epilog="User errors are printed as one line; --traceback shows the traceback.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.add_typer(presets.app, name="presets")
app.command("report")(report.report)
app.command("convert")(convert.convert)


def _show_version(value: bool) -> None:
    if not value:
        return
    try:
        typer.echo(f"reft {version('reft')}")
    except PackageNotFoundError:
        typer.echo("reft (not installed)")
    raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the traceback of an error.")
    ] = False,
) -> None:
    context.obj = {"traceback": traceback}
    command = context.invoked_subcommand
    if command is None:
        typer.echo(context.get_help())
    elif command != "train":
        refuse_several(f"reft {command}", "torchrun and accelerate launch are for reft train")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: code 0 on success, 2 after a user error.

    Args:
        arguments: command line arguments without the program name; None for ``sys.argv``.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    command: Any = typer.main.get_command(app)
    try:
        code = command.main(args=given, prog_name="reft", standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = _message(error, given)
        if message is None or "--traceback" in given:
            raise
        typer.echo(f"Error: {message}", err=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _value(error: Exception, given: Sequence[str]) -> str:
    """Return the refused value of an option, which click's message does not show."""
    names = getattr(getattr(error, "param", None), "opts", ())
    for at, argument in enumerate(given):
        name, equals, value = argument.partition("=")
        if name in names and (equals or at + 1 < len(given)):
            return f", got {value if equals else given[at + 1]!r}"
    return ""


def _message(error: Exception, given: Sequence[str]) -> str | None:
    """Return the message of a user error; None if the error is a defect of reft."""
    if hasattr(error, "format_message"):  # errors of click, of which typer vendors a copy
        context = getattr(error, "ctx", None)
        where = f" (see {context.command_path} --help)" if context is not None else ""
        return " ".join(error.format_message().split()) + _value(error, given) + where
    if isinstance(error, (UserError, ValueError, OSError, ImportError)):
        return one_line(error)
    if type(error).__name__ == "OutOfMemoryError":
        return f"{one_line(error)} (a smaller --batch-size may help)"
    if isinstance(error, typer.Abort):
        return "aborted"
    return None
