"""The command line: ``python -m benchmarks --help``."""

from __future__ import annotations

import typer

from benchmarks.compare import compare_results
from benchmarks.compile import compile_kernels
from benchmarks.gpu_session.archive import unpack_results
from benchmarks.gpu_session.rehearsal import rehearse_session
from benchmarks.gpu_session.session import run_session
from benchmarks.learning.command import learn
from benchmarks.report.command import write_report
from benchmarks.run import list_suites, run_suites
from benchmarks.sweep import sweep_settings

app = typer.Typer(
    help="Measure this library beside other libraries: same work, same run, checked first.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("list")(list_suites)
app.command("run")(run_suites)
app.command("compare")(compare_results)
app.command("report")(write_report)
app.command("compile")(compile_kernels)
app.command("sweep")(sweep_settings)
app.command("gpu")(run_session)
app.command("unpack")(unpack_results)
app.command("rehearse")(rehearse_session)
app.command("learn")(learn)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
