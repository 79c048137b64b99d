"""The command line: ``python -m benchmarks compile``."""

from __future__ import annotations

import typer

from benchmarks.compile import compile_kernels

app = typer.Typer(
    help="Measure the kernels.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compile")(compile_kernels)


@app.callback()
def _root() -> None:
    """Keeps ``compile`` a word to type, though it is the only command."""


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
