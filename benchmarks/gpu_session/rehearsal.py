"""``python -m benchmarks rehearse``: what a session on a GPU will take, found without a GPU.

The tiny session runs to its end, the kernel tests run in the interpreter, and every build that the
real session asks for is compiled for an H100 by a driver that launches nothing, from an empty
cache. A stage is predicted to take the start of its process, its builds divided among its workers
(no less than those that wait for one another), and what it measures. Only the last is an estimate:
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
    longest,
    of_launches,
    of_suites,
    of_sweep,
)
from benchmarks.gpu_session.session import environment_of
from benchmarks.gpu_session.stages import BUDGETS, OP_JOBS, PARITY_JOBS, SWEEP_JOBS
from benchmarks.revision import ROOT
from benchmarks.run import stop

#: Processes that share the builds of a stage; other stages have one.
WORKERS = {"parity": PARITY_JOBS, "op": OP_JOBS, "sweep": SWEEP_JOBS}
#: Cases of the sweep that must fit its budget: prompt ends, and every row.
SWEEP_CASES = 2
#: Stage -> how many times how many seconds it measures, without compiling; what is beyond is
#: measured as time allows. Estimates: no GPU has run these yet.
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
#: Seconds of a test on a GPU beside its builds, and of a candidate of the sweep: its check against
#: float64, its capture and its rounds. Estimates too.
TEST, CANDIDATE = 0.1, 0.65
#: The whole session, in seconds.
LIMIT = 540.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """A stage of the session.

    Attributes:
        builds: that were not in the cache; compiling: their CPU seconds.
        waiting: seconds until its workers have compiled them.
        starting, measuring: seconds of all else.
        budget: seconds that the session gives it.
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
        """All of it."""
        return self.starting + self.waiting + self.measuring


def rehearse_session(
    output: Annotated[Path, typer.Option(help="Folder of logs and of rehearsal.json.")],
    jobs: Annotated[int, typer.Option(min=1, help="Processes that test and compile here.")] = (
        os.cpu_count() or 1
    ),
) -> None:
    """Run the tiny session, compile what the real one needs, predict how long each stage takes."""
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    _run(console, output, "session", ["-m", "benchmarks", "gpu", "--tiny", "--output", str(output)])
    starting = _seconds_to_start()
    launches, tests = _launches_of_tests(console, output, jobs)
    requests = [*of_launches(launches), *of_suites(), *of_sweep(SWEEP_CASES)]
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
    # A candidate of the sweep may not compile: it is left out there too. None may compute wrong.
    complaints += [
        f"{each.request.stage}, {each.request.label}: {each.failed}"
        for each in built
        if each.failed and (each.request.stage != "sweep" or each.failed.startswith(HAZARD))
    ]
    if complaints:
        stop("; ".join(complaints), 1)
    console.print(f"rehearsal passed: {total:.0f} s of {LIMIT:.0f}, written to {output}")


def predict(built: Sequence[Built], tests: int, starting: float) -> list[Prediction]:
    """What each stage takes.

    Args:
        built: what was compiled, for which stage.
        tests: how many tests the parity stage runs.
        starting: seconds until a process has imported what it needs.
    """
    seconds: dict[str, list[float]] = {stage: [] for stage in BUDGETS}
    for each in built:
        seconds[each.request.stage] += each.seconds
    in_a_row = longest(built)
    candidates = sum(each.request.stage == "sweep" for each in built)
    measuring = {stage: count * each for stage, (count, each) in MEASURING.items()}
    measuring |= {"parity": tests * TEST / PARITY_JOBS, "sweep": candidates * CANDIDATE}
    return [
        Prediction(
            stage=stage,
            builds=len(seconds[stage]),
            compiling=sum(seconds[stage]),
            waiting=max(sum(seconds[stage]) / WORKERS.get(stage, 1), in_a_row.get(stage, 0.0)),
            # Workers start after the process that starts them.
            starting=starting * (2 if stage in WORKERS else 1),
            measuring=measuring[stage],
            budget=budget,
        )
        for stage, budget in BUDGETS.items()
    ]


def _print(console: Console, predictions: Sequence[Prediction]) -> None:
    table = Table(
        "stage", "builds", "core s", "workers", "compile s", "start s", "measure s", "sum s",
        "budget s", title="a session on a GPU, predicted",
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
    """Run a step with a log of its own; the rehearsal ends if it fails."""
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
    """Seconds until a process of the benchmarks has imported what it needs."""
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
    """What the tests launch that run on a GPU too, and how many tests that are."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "launches"
        printed = _run(
            console,
            output,
            "tests",
            ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "reft_kernels.launch_recorder",
             "-n", str(jobs), "--dist", "worksteal", "-m", "not interpreter and not host",
             "tests/kernels"],
            REFT_LAUNCHES=str(file),
        )  # fmt: skip
        lines = file.read_text(encoding="utf-8").splitlines()
    counts = [int(number) for number in re.findall(r"(\d+) (?:passed|skipped)", printed)]
    return lines, sum(counts)


def _compiled(console: Console, requests: Sequence[Request], jobs: int) -> list[Built]:
    """Compile what is asked for, in processes that start with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(_environment(TRITON_CACHE_DIR=cache))
        os.environ.pop("TRITON_INTERPRET", None)
        with ProcessPoolExecutor(
            jobs, mp_context=multiprocessing.get_context("spawn"), initializer=single_thread
        ) as pool:
            built = pool.map(build, requests)
            total = len(requests)
            return list(track(built, "compiling", total=total, console=console, transient=True))
