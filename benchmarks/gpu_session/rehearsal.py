"""The command ``python -m benchmarks rehearse``: predict a session on a GPU without a GPU.

It runs the tiny session and the kernel tests in the interpreter. Then it compiles every build of
the real session for an H100, from an empty cache, with a driver that launches nothing. The
predicted time of a stage is the start of its processes, plus its builds divided among its workers
(at least the longest sequence of builds), plus its measurements. Only the last is an estimate:
:data:`MEASURING`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.compile import single_thread
from benchmarks.gpu_session.builds import (
    HAZARD,
    Built,
    Request,
    build,
    launch_requests,
    longest_sequence,
    suite_requests,
    sweep_requests,
)
from benchmarks.gpu_session.session import environment_of
from benchmarks.gpu_session.stages import BUDGETS, OP_JOBS, PARITY_JOBS, SWEEP_JOBS
from benchmarks.revision import ROOT
from benchmarks.run import stop

#: Processes that share the builds of a stage; other stages have one process.
WORKERS = {"parity": PARITY_JOBS, "op": OP_JOBS, "sweep": SWEEP_JOBS}
#: Number of cases of the sweep that must fit its budget: prompt ends, and every row.
SWEEP_CASES = 2
#: Maps a stage to (number of cases, seconds per case) to measure without compiling; further cases
#: run as time allows. These are estimates: no GPU has run them yet.
MEASURING: Mapping[str, tuple[int, float]] = {
    "op": (12, 3.0),
    "step": (3, 8.0),
    "orthonormal": (11, 1.0),
    "layer": (2, 5.0),
    "memory": (2, 7.0),
    "generate": (2, 9.0),
    "load": (2, 5.0),
    "serve": (2, 8.0),
    "offsets": (4, 1.0),
    "report": (1, 6.0),
}
#: Seconds of a test on a GPU without its builds, and of a candidate of the sweep: its check, its
#: capture and its rounds. These are estimates too.
TEST_SECONDS, CANDIDATE_SECONDS = 0.1, 0.65
#: Seconds of the whole session.
LIMIT = 540.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predicted time of a stage.

    Attributes:
        builds, compiling: number and CPU seconds of the builds that were not in the cache.
        waiting: seconds until the workers have compiled them.
        starting, measuring: seconds of imports and of measurements.
        budget: seconds that the session gives the stage.
    """

    stage: str
    builds: int
    compiling: float
    waiting: float
    starting: float
    measuring: float
    budget: float

    @property
    def seconds(self) -> float:
        """The sum of all parts."""
        return self.starting + self.waiting + self.measuring


def rehearse_session(
    output: Annotated[Path, typer.Option(help="Folder of logs and rehearsal.json.")],
    jobs: Annotated[int, typer.Option(min=1, help="Processes that test and compile.")] = (
        os.cpu_count() or 1
    ),
) -> None:
    """Run the tiny session, compile the builds of the real one, and predict its stages."""
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    _run(console, output, "session", ["-m", "benchmarks", "gpu", "--tiny", "--output", str(output)])
    starting = _seconds_to_start()
    launches, tests = _launches_of_tests(console, output, jobs)
    requests = [*launch_requests(launches), *suite_requests(), *sweep_requests(SWEEP_CASES)]
    built = _compiled(console, requests, jobs)
    predictions = predict(built, tests, starting)
    report = {
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "tests": tests,
        "stages": [asdict(each) | {"seconds": each.seconds} for each in predictions],
        "failed": [f"{each.request.label}: {each.failed}" for each in built if each.failed],
    }
    (output / "rehearsal.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _print(console, predictions)
    complaints = [
        f"{each.stage} takes {each.seconds:.0f} s of its {each.budget:.0f}"
        for each in predictions
        if each.seconds > each.budget
    ]
    total = sum(each.seconds for each in predictions)
    if total > LIMIT:
        complaints.append(f"the session takes {total:.0f} s of {LIMIT:.0f}")
    # The sweep skips a candidate that does not compile; none may compute wrongly.
    complaints += [
        f"{each.request.stage}, {each.request.label}: {each.failed}"
        for each in built
        if each.failed and (each.request.stage != "sweep" or each.failed.startswith(HAZARD))
    ]
    if complaints:
        stop("; ".join(complaints), 1)
    console.print(f"rehearsal passed: {total:.0f} s of {LIMIT:.0f}, written to {output}")


def predict(built: Sequence[Built], tests: int, starting: float) -> list[Prediction]:
    """Predict the time of each stage.

    Args:
        built: the compiled requests.
        tests: number of tests in the stage "parity".
        starting: seconds that a process needs for its imports.
    """
    seconds: dict[str, list[float]] = {stage: [] for stage in BUDGETS}
    for each in built:
        seconds[each.request.stage] += each.seconds
    sequences = longest_sequence(built)
    candidates = sum(each.request.stage == "sweep" for each in built)
    measuring = {stage: count * each for stage, (count, each) in MEASURING.items()}
    measuring |= {
        "parity": tests * TEST_SECONDS / PARITY_JOBS,
        "sweep": candidates * CANDIDATE_SECONDS,
    }
    return [
        Prediction(
            stage=stage,
            builds=len(seconds[stage]),
            compiling=sum(seconds[stage]),
            waiting=max(sum(seconds[stage]) / WORKERS.get(stage, 1), sequences.get(stage, 0.0)),
            # Workers start after their parent process.
            starting=starting * (2 if stage in WORKERS else 1),
            measuring=measuring[stage],
            budget=budget,
        )
        for stage, budget in BUDGETS.items()
    ]


def _print(console: Console, predictions: Sequence[Prediction]) -> None:
    table = Table(
        "stage", "builds", "core s", "workers", "compile s", "start s", "measure s", "sum s",
        "budget s", title="predicted session on a GPU",
    )  # fmt: skip
    for each in predictions:
        numbers = (each.waiting, each.starting, each.measuring, each.seconds, each.budget)
        table.add_row(
            each.stage, str(each.builds), f"{each.compiling:.0f}",
            str(WORKERS.get(each.stage, 1)), *(f"{number:.0f}" for number in numbers),
        )  # fmt: skip
    sums = (
        sum(getattr(each, name) for each in predictions)
        for name in ("waiting", "starting", "measuring", "seconds", "budget")
    )
    builds, core = (sum(getattr(e, name) for e in predictions) for name in ("builds", "compiling"))
    table.add_section()
    table.add_row("sum", str(builds), f"{core:.0f}", "", *(f"{number:.0f}" for number in sums))
    console.print(table)


def _environment(**more: str) -> dict[str, str]:
    return environment_of(tiny=False, commit=None) | more


def _run(
    console: Console, output: Path, name: str, command: Sequence[str], **environment: str
) -> str:
    """Run a step of the rehearsal with a log; exit if it fails."""
    console.print(f"[bold]{name}[/]: {' '.join(command)}", highlight=False, soft_wrap=True)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    (output / f"{name}.log").write_text(done.stdout, encoding="utf-8")
    last = done.stdout.strip().splitlines()[-1:] or [""]
    console.print(f"  {last[0]} ({time.perf_counter() - began:.0f} s)", highlight=False)
    if done.returncode != 0:
        stop(f"{name} failed, see {output / name}.log", 1)
    return done.stdout


def _seconds_to_start() -> float:
    """Seconds that a process of the benchmarks needs for its imports."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "benchmarks", "list"],
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - began


def _launches_of_tests(console: Console, output: Path, jobs: int) -> tuple[list[str], int]:
    """The launches of the tests that also run on a GPU, and the number of these tests."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "launches"
        printed = _run(
            console,
            output,
            "tests",
            ["-m", "pytest", "-q", "-p", "no:cacheprovider",
             "-p", "reft_kernels.devtools.launch_recorder",
             "-n", str(jobs), "--dist", "worksteal", "-m", "not interpreter and not host",
             "tests/kernels"],
            REFT_LAUNCHES=str(file),
        )  # fmt: skip
        lines = file.read_text(encoding="utf-8").splitlines()
    counts = [int(number) for number in re.findall(r"(\d+) (?:passed|skipped)", printed)]
    return lines, sum(counts)


def _compiled(console: Console, requests: Sequence[Request], jobs: int) -> list[Built]:
    """Compile requests in several processes that start with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(_environment(TRITON_CACHE_DIR=cache))
        os.environ.pop("TRITON_INTERPRET", None)
        with ProcessPoolExecutor(
            jobs, mp_context=multiprocessing.get_context("spawn"), initializer=single_thread
        ) as pool:
            built = pool.map(build, requests)
            total = len(requests)
            return list(track(built, "compiling", total=total, console=console, transient=True))
