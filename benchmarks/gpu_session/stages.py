"""What a session on a GPU runs, and how: one process after the other, each within its seconds."""

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

#: Seconds of each stage, in the order they run: what matters most first. A call on the device ends
#: after 600 s; 540 leave room for its start and end. The split is an estimate: builds counted in
#: the interpreter times the seconds of one, and cases times the seconds of what each measures.
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
#: Processes that compile or test at the same time: the machine has 16 cores, and together they may
#: take 24 GiB of its GPU, see ``footprint.py``.
PARITY_JOBS, OP_JOBS, SWEEP_JOBS = 12, 8, 4
#: Threads and settings of every stage. Deterministic matrix products ask for a workspace.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "PYTHONUNBUFFERED": "1",
    "COLUMNS": "160",
}
#: Stages that are tests; their logs are pytest's.
TESTS = ("parity", "offsets")
#: Each of these takes 16 GiB of the GPU: they run by themselves, one after the other.
_LARGE = "tests/kernels/test_costs.py::test_offsets_beyond_32_bits"
#: Of these words one is replaced in each command.
OUTPUT, SECONDS = "{output}", "{seconds}"
#: Seconds between two looks at a stage that runs.
LOOK = 10.0


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a session.

    Attributes:
        command: arguments of the Python interpreter.
        seconds: its budget.
        grace: so many seconds before its end it is interrupted, to say what it has so far.
    """

    name: str
    command: Sequence[str]
    seconds: float
    grace: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stage ended: "passed", "failed" or "stopped" (out of time), after ``seconds``."""

    stage: str
    ended: str
    seconds: float
    last_line: str


def stages(tiny: bool) -> tuple[Stage, ...]:
    """The session, in order; ``tiny`` is the smallest of everything, for Triton's interpreter."""
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
    # Interrupted, pytest ends its workers, which may take 10 s, and prints what failed until then.
    grace = {"parity": 20.0}
    return tuple(
        Stage(name, command, BUDGETS[name], grace.get(name, 0.0))
        for name, command in commands.items()
    )


def run_stages(
    wanted: Sequence[Stage],
    budget: float,
    folder: Path,
    environment: Mapping[str, str],
    report: Callable[[Sequence[Outcome], str | None], object],
) -> list[Outcome]:
    """Run stages one after the other, whatever becomes of those before.

    Args:
        budget: seconds of all; each stage has its own share of them, and what one leaves over goes
            to those behind it. A stage that is over its time is killed with its children.
        folder: of the rows; every stage writes a log there.
        report: called with the outcomes so far and the stage that runs, None after the last: at the
            beginning of each stage, every ten seconds and at the end.
    """
    outcomes: list[Outcome] = []
    began = time.perf_counter()
    for place, stage in enumerate(wanted):
        left = max(0.0, budget - (time.perf_counter() - began))
        seconds = left * stage.seconds / sum(other.seconds for other in wanted[place:])
        words = {OUTPUT: str(folder), SECONDS: f"{0.9 * seconds:.0f}"}
        command = [words.get(word, word) for word in stage.command]
        report(outcomes, stage.name)
        typer.echo(f"{stage.name}, at most {seconds:.0f} s")
        look = partial(report, outcomes, stage.name)
        outcomes.append(_run(stage, command, seconds, folder, environment, look))
        typer.echo("  {ended} after {seconds:.0f} s: {last_line}".format(**asdict(outcomes[-1])))
    report(outcomes, None)
    return outcomes


def _run(
    stage: Stage,
    command: Sequence[str],
    seconds: float,
    folder: Path,
    environment: Mapping[str, str],
    look: Callable[[], object],
) -> Outcome:
    log = folder / f"{stage.name}.log"
    began = time.perf_counter()
    # A group of its own, to be killed as a whole; no session of its own, which would outlive the
    # command that a machine is lent for.
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
            status = _wait(process, began + max(0.0, seconds - stage.grace), look)
            stopped = status is None
            if stopped and stage.grace:
                process.send_signal(signal.SIGINT)
                _wait(process, began + seconds, look)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    ended = "stopped" if stopped else "passed" if status == 0 else "failed"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1].strip()[:200] if lines else ""
    return Outcome(stage.name, ended, time.perf_counter() - began, last)


def _wait(process: subprocess.Popen[bytes], until: float, look: Callable[[], object]) -> int | None:
    """The exit status of a process, None if it still runs at ``until``."""
    while (left := until - time.perf_counter()) > 0:
        try:
            return process.wait(timeout=min(LOOK, left))
        except subprocess.TimeoutExpired:
            look()
    return process.poll()
