"""The stages of a session on a GPU: one process after the other, each with a time budget."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import typer

from benchmarks.revision import ROOT

#: Seconds of each stage, in order of execution: the most important first. A call on the device ends
#: after 600 s; 540 s leave room for its start and end. The split is an estimate, from the number of
#: builds times the seconds of a build and the number of cases times the seconds of a case.
BUDGETS: dict[str, float] = {
    "parity": 90.0,
    "op": 85.0,
    "step": 80.0,
    "sweep": 120.0,
    "orthonormal": 22.0,
    "layer": 20.0,
    "memory": 25.0,
    "generate": 28.0,
    "load": 18.0,
    "serve": 27.0,
    "offsets": 10.0,
    "report": 15.0,
}
#: Processes that compile or test at the same time. The machine has 16 cores; the processes of a
#: stage may take 24 GiB of its GPU together (``footprint.py``).
PARITY_JOBS, OP_JOBS, SWEEP_JOBS = 12, 8, 4
#: Environment of every stage. Deterministic matrix products need a cuBLAS workspace.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "PYTHONUNBUFFERED": "1",
    "COLUMNS": "160",
}
#: Stages that run pytest.
TESTS = ("parity", "offsets")
#: Tests that take 16 GiB of the GPU each; they run alone, one after the other.
_LARGE = "tests/kernels/test_costs.py::test_offsets_beyond_32_bits"
#: Placeholders in commands: the output folder, and the seconds of the stage.
OUTPUT, SECONDS = "{output}", "{seconds}"
#: Seconds between two reports while a stage runs.
REPORT_EVERY = 10.0


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a session.

    Attributes:
        command: arguments of the Python interpreter.
        seconds: the budget.
        grace: seconds before the end of the budget at which the stage receives SIGINT, so that it
            can print its results so far.
    """

    name: str
    command: Sequence[str]
    seconds: float
    grace: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a stage after ``seconds``: "passed", "failed" or "stopped" (out of time)."""

    stage: str
    ended: str
    seconds: float
    last_line: str


def stages(tiny: bool) -> tuple[Stage, ...]:
    """The stages in order; ``tiny`` selects the smallest sizes, for Triton's interpreter."""
    device, size, rounds = ("cpu", "ci", "1") if tiny else ("cuda", "gpu", "3")
    where = ("--device", device, "--size", size, "--limit", SECONDS, "--output", OUTPUT)

    def suite(name: str, seconds: str = "2", jobs: int = 0) -> tuple[str, ...]:
        seconds = "0" if tiny else seconds
        each = ("--seconds", seconds, "--rounds", rounds, "--jobs", str(jobs))
        return ("-m", "benchmarks", "run", name, *where, *each)

    pytest = ("-m", "pytest", "-q", "--device", device, "-p", "no:cacheprovider", "-rfE",
              "--durations=25")  # fmt: skip
    parity: tuple[str, ...] = ("-n", str(PARITY_JOBS), "--dist", "worksteal", "tests/kernels",
                               "--deselect", _LARGE)  # fmt: skip
    large: tuple[str, ...] = (_LARGE,)
    sweep: tuple[str, ...] = ("--jobs", str(SWEEP_JOBS))
    if tiny:
        parity = ("tests/kernels/test_parity.py", "-k", "D64 and fp32")
        large = (_LARGE, "-k", "torch-rows")
        sweep = ("--jobs", "1", "--most", "2")
    commands = {
        "parity": (*pytest, *parity),
        "op": suite("op", "0.3", jobs=0 if tiny else OP_JOBS),
        "step": suite("step"),
        "sweep": ("-m", "benchmarks", "sweep", *where, *sweep),
        "orthonormal": suite("orthonormal", "0.5"),
        "layer": suite("layer"),
        "memory": suite("memory"),
        "generate": suite("generate"),
        "load": suite("load"),
        "serve": suite("serve", "0.5"),
        "offsets": (*pytest, *large),
        "report": ("-m", "benchmarks", "report", OUTPUT),
    }
    # After SIGINT pytest ends its workers, which can take 10 s, and prints the failures so far.
    grace = {"parity": 20.0}
    return tuple(
        Stage(name, command, BUDGETS[name], grace.get(name, 0.0))
        for name, command in commands.items()
    )


def run_stages(
    selected: Sequence[Stage],
    budget: float,
    folder: Path,
    environment: Mapping[str, str],
    report: Callable[[Sequence[Outcome], str | None], object],
) -> list[Outcome]:
    """Run stages one after the other; a stage that fails does not stop the next ones.

    Args:
        budget: seconds of all stages. Each has a share; unused seconds go to the next stages. A
            stage that exceeds its share is killed with its children.
        folder: the folder of rows and of a log per stage.
        report: receives the outcomes so far and the name of the running stage (None after the
            last). It is called when a stage begins, every ten seconds, and at the end.
    """
    outcomes: list[Outcome] = []
    began = time.perf_counter()
    for index, stage in enumerate(selected):
        left = max(0.0, budget - (time.perf_counter() - began))
        seconds = left * stage.seconds / sum(other.seconds for other in selected[index:])
        placeholders = {OUTPUT: str(folder), SECONDS: f"{0.9 * seconds:.0f}"}
        command = [placeholders.get(word, word) for word in stage.command]
        report(outcomes, stage.name)
        typer.echo(f"{stage.name}, at most {seconds:.0f} s")
        report_now = partial(report, outcomes, stage.name)
        outcomes.append(_run(stage, command, seconds, folder, environment, report_now))
        typer.echo("  {ended} after {seconds:.0f} s: {last_line}".format(**asdict(outcomes[-1])))
    report(outcomes, None)
    return outcomes


def _run(
    stage: Stage,
    command: Sequence[str],
    seconds: float,
    folder: Path,
    environment: Mapping[str, str],
    report_now: Callable[[], object],
) -> Outcome:
    log = folder / f"{stage.name}.log"
    began = time.perf_counter()
    # A new process group can be killed as a whole. A new session would outlive the command for
    # which the machine is lent.
    with (
        log.open("wb") as file,
        subprocess.Popen(
            [sys.executable, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=dict(environment),
            process_group=0,
        ) as process,
    ):
        try:
            status = _wait(process, began + max(0.0, seconds - stage.grace), report_now)
            stopped = status is None
            if stopped and stage.grace:
                process.send_signal(signal.SIGINT)
                _wait(process, began + seconds, report_now)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    ended = "stopped" if stopped else "passed" if status == 0 else "failed"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1].strip()[:200] if lines else ""
    return Outcome(stage.name, ended, time.perf_counter() - began, last)


def _wait(
    process: subprocess.Popen[bytes], until: float, report_now: Callable[[], object]
) -> int | None:
    """Wait for a process; return its exit status, or None if it still runs at ``until``."""
    while (left := until - time.perf_counter()) > 0:
        try:
            return process.wait(timeout=min(REPORT_EVERY, left))
        except subprocess.TimeoutExpired:
            report_now()
    return process.poll()
