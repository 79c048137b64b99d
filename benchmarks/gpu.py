"""``python -m benchmarks gpu``: all that a visit to a GPU needs, in one command of nine minutes.

Parity first, then the sweep of launch settings, then every suite, then tables and plots. Each stage
is a process of its own with a share of the time; what one leaves over goes to those behind it. Rows
are written as they come, so a stage that is stopped has lost nothing but its rest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import ROOT, describe, folder_name
from benchmarks.records import RESULTS
from benchmarks.run import stop

#: Of these words one is replaced in each command.
_OUTPUT, _DEVICE, _SIZE, _SECONDS, _EFFORT = (
    "{output}",
    "{device}",
    "{size}",
    "{seconds}",
    "{effort}",
)


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a visit.

    Attributes:
        command: arguments of the Python interpreter.
        share: of the time, relative to the others.
        essential: whether the stages behind it are pointless if it fails.
    """

    name: str
    command: Sequence[str]
    share: float
    essential: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stage ended: "passed", "failed" or "stopped" (out of time), after ``seconds``."""

    stage: str
    ended: str
    seconds: float
    last_line: str


def _suite(name: str, share: float, effort: str = _EFFORT, jobs: int = 0) -> Stage:
    return Stage(
        name,
        ("-m", "benchmarks", "run", name, "--device", _DEVICE, "--size", _SIZE, "--seconds", effort,
         "--rounds", "3", "--limit", _SECONDS, "--output", _OUTPUT, "--jobs", str(jobs)),
        share,
    )  # fmt: skip


def stages(tiny: bool) -> tuple[Stage, ...]:
    """The visit, in order; ``tiny`` parity is a handful of cases, for the interpreter."""
    some = ["tests/kernels/test_parity.py", "-k", "D64 and fp32"] if tiny else ["tests/kernels"]
    workers = [] if tiny else ["-n", "12", "--dist", "worksteal"]
    return (
        Stage(
            "parity",
            ("-m", "pytest", "-q", "--device", _DEVICE, "-p", "no:cacheprovider", *workers, *some),
            150,
            essential=True,
        ),
        Stage(
            "sweep",
            ("-m", "benchmarks", "sweep", "--device", _DEVICE, "--size", _SIZE,
             "--limit", _SECONDS, "--output", _OUTPUT),
            70,
        ),
        _suite("op", 110, "0.3", jobs=2 if tiny else 12),
        _suite("orthonormal", 15, "0.5"),
        _suite("layer", 25),
        _suite("step", 75),
        _suite("memory", 20),
        _suite("generate", 25),
        _suite("load", 15),
        _suite("serve", 20, "0.5"),
        Stage("report", ("-m", "benchmarks", "report", _OUTPUT), 15),
    )  # fmt: skip


def visit_gpu(
    output: Annotated[
        Path | None, typer.Option(help="Folder of all results. Default: results/<device>.")
    ] = None,
    budget: Annotated[float, typer.Option(min=10, max=540, help="Seconds for all of it.")] = 540.0,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Tiny shapes, the kernels interpreted: no GPU is needed.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option("--stage", help="Only this stage; may be repeated.")
    ] = None,
) -> None:
    """Parity, sweep, every suite, tables and plots on a GPU, within nine minutes."""
    known = {stage.name: stage for stage in stages(tiny)}
    unknown = [name for name in only or () if name not in known]
    if unknown:
        stop(f"--stage must be one of {', '.join(known)}; got {unknown[0]!r}", 2)
    if not tiny and not torch.cuda.is_available():
        stop("this machine has no CUDA device; --tiny tries everything without one", 2)
    device = torch.device("cpu" if tiny else "cuda")
    if tiny and output is None:
        stop("--tiny needs --output: interpreted kernels are no results to keep", 2)
    folder = (output or RESULTS / folder_name(device)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    words = {_OUTPUT: str(folder), _DEVICE: device.type, _SIZE: "ci" if tiny else "gpu",
             _EFFORT: "0" if tiny else "2"}  # fmt: skip
    console = Console()
    wanted = [known[name] for name in only] if only else list(known.values())
    outcomes = run_stages(wanted, words, budget, folder, _environment(tiny), console)
    report = {"machine": describe(device), "tiny": tiny, "stages": [asdict(o) for o in outcomes]}
    (folder / "visit.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table = Table("stage", "ended", "seconds", "last line")
    for one in outcomes:
        table.add_row(one.stage, one.ended, f"{one.seconds:.0f}", one.last_line)
    console.print(table)
    console.print(f"written to {folder}")
    if any(one.ended != "passed" for one in outcomes):
        raise typer.Exit(1)


def run_stages(
    wanted: Sequence[Stage],
    words: Mapping[str, str],
    budget: float,
    folder: Path,
    environment: Mapping[str, str],
    console: Console,
) -> list[Outcome]:
    """Run stages one after the other; each gets its share of the time that is left.

    A failed essential stage stops the visit: numbers of wrong kernels are worth nothing.
    """
    outcomes: list[Outcome] = []
    began = time.perf_counter()
    for place, stage in enumerate(wanted):
        left = budget - (time.perf_counter() - began)
        seconds = left * stage.share / sum(one.share for one in wanted[place:])
        words_now: dict[str, Any] = {**words, _SECONDS: f"{0.9 * seconds:.0f}"}
        command = [words_now.get(word, word) for word in stage.command]
        console.print(f"[bold]{stage.name}[/] (at most {seconds:.0f} s)")
        outcomes.append(_run(stage.name, command, seconds, folder, environment))
        console.print(f"  {outcomes[-1].ended}: {outcomes[-1].last_line}", highlight=False)
        if stage.essential and outcomes[-1].ended != "passed":
            console.print("the rest is not measured")
            break
    return outcomes


def _run(
    name: str, command: Sequence[str], seconds: float, folder: Path, environment: Mapping[str, str]
) -> Outcome:
    log = folder / f"{name}.log"
    began = time.perf_counter()
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            [sys.executable, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=dict(environment),
            start_new_session=True,
        ) as process,
    ):
        try:
            ended = "passed" if process.wait(timeout=seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            ended = "stopped"
            os.killpg(process.pid, signal.SIGKILL)  # the workers of pytest too
    lines = log.read_text(encoding="utf-8").strip().splitlines()
    return Outcome(name, ended, time.perf_counter() - began, lines[-1][:200] if lines else "")


def _environment(tiny: bool) -> dict[str, str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    environment.pop("TRITON_INTERPRET", None)
    if tiny:
        environment["TRITON_INTERPRET"] = "1"
    return environment
