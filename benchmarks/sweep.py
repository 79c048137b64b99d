"""The command ``python -m benchmarks sweep``: find launch settings of the kernels on a device.

The settings of one kernel are varied at a time; the other kernel keeps the table's. Worker
processes compile candidates in batches and check them against float64. Candidates that pass are
timed alone, in turns with the table's settings, forward and backward together. ``settings.json`` is
the table with the winners, rewritten after every candidate. Copied over
``reft_kernels/_triton/measured.json`` it becomes the table that users get.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.cases import DTYPES, OpCase
from benchmarks.gate import OpGate, result_of
from benchmarks.machine import describe, folder_name
from benchmarks.peers import Operator
from benchmarks.peers.ours import edit as operator_of
from benchmarks.result_rows import RESULTS, Gate, Row, Writer, replace_file
from benchmarks.run import release, requested_device, stop
from benchmarks.suites import first_line
from benchmarks.suites.op import Workload, calls_of, cold_workloads, tensors
from benchmarks.timing import (
    Clock,
    Effort,
    Run,
    failed_capture,
    graph_run,
    interleave,
    quantiles,
)
from reft_kernels import explain
from reft_kernels.devtools import tuning
from reft_kernels.devtools.testing import Edit

#: Largest ratio to the table at which a candidate replaces it; the rest is within the noise.
GAIN = 0.97
_TABLE = "table"
#: Default number of processes that check; they share the memory of a GPU (``footprint.py``).
JOBS = 4
_EFFORTS = {"ci": Effort(0, 1, 1, warmup=0), "gpu": Effort(0.05, 5, 30)}


@dataclass(frozen=True, slots=True)
class Job:
    """A candidate of a kernel in a case."""

    case: OpCase
    kernel: str
    settings: tuning.KernelConfig
    device: str


def cases(size: str) -> list[OpCase]:
    """Prompt ends and every row, by rank and dtype, the most common first.

    Prompt ends lie in sequences of 16; longer sequences are the same work in more memory.
    """
    if size == "ci":
        return [OpCase("f7+l7", 1, 16, 64, 4)]
    shapes = (("f7+l7", 32, 16), ("all", 16, 512))
    return [
        OpCase(positions, batch, sequence, 4096, rank, dtype)
        for dtype in ("bf16", "fp32")
        for rank in (8, 32, 4, 1, 16, 64)
        for positions, batch, sequence in shapes
    ]


def sweep_settings(
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: a GPU if there is one.")
    ] = None,
    size: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(_EFFORTS)}; ci is a single small shape, to try the command."
        ),
    ] = "gpu",
    match: Annotated[str, typer.Option(help="Run only cases whose id contains this text.")] = "",
    limit: Annotated[
        float,
        typer.Option(min=0, help="Start no candidate after this many seconds; 0 for no limit."),
    ] = 0.0,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes that compile and check, up to 4 GiB each.")
    ] = min(JOBS, os.cpu_count() or 1),
    most: Annotated[int, typer.Option(min=0, help="Candidates per kernel; 0 for all.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results. Default: results/<device>.")
    ] = None,
) -> None:
    """Time launch settings of the Triton kernels and write a table of the fastest."""
    try:
        target = requested_device(device)
        if size not in _EFFORTS:
            raise ValueError(f"--size takes {', '.join(_EFFORTS)}, got {size!r}")
        if target.type == "cpu" and size != "ci":
            raise ValueError("without a GPU only --size ci can be swept, with TRITON_INTERPRET=1")
        selected = [case for case in cases(size) if match in str(case)]
        if not selected:
            raise ValueError(f"no case of the sweep ({size}) contains {match!r}")
        _check_triton(selected[0], target)
    except ValueError as error:
        stop(str(error), 2)
    folder = output or RESULTS / folder_name(target)
    folder.mkdir(parents=True, exist_ok=True)
    console, writer = Console(), Writer(folder)
    entries: list[dict[str, Any]] = []
    until = time.perf_counter() + limit if limit else None
    # Spawned, not forked: a CUDA context does not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        plan = Plan(target, pool, jobs, _EFFORTS[size], most, until)
        for number, case in enumerate(selected):
            if plan.over:
                reason = failed_capture() or "time limit reached"
                console.print(
                    f"{reason}; {len(selected) - number} of {len(selected)} cases not run"
                )
                break
            console.print(f"[bold]sweep[/] {case} ({number + 1} of {len(selected)})")
            release(target)
            for kernel in tuning.KERNELS:
                rows: list[Row] = []
                for row in writer.write(sweep_case(case, kernel, plan)):
                    rows.append(row)
                    table = tuning.updated_table(entries + winners(case, kernel, rows, target))
                    replace_file(folder / "settings.json", table.encode())
                entries += winners(case, kernel, rows, target)
                console.print(f"  {kernel}: {_summary(rows)}", highlight=False)
    console.print(f"{len(entries)} settings beat the table, written to {folder}")


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings of a sweep.

    Attributes:
        pool: the executor of ``jobs`` processes that check candidates.
        most: largest number of candidates per kernel; 0 for all.
        until: the time to stop, by ``time.perf_counter``; None for no limit.
    """

    device: torch.device
    pool: Executor
    jobs: int
    effort: Effort
    most: int = 0
    until: float | None = None

    @property
    def over(self) -> bool:
        """Whether no further candidate may start."""
        late = self.until is not None and time.perf_counter() > self.until
        return late or failed_capture() is not None


def sweep_case(case: OpCase, kernel: str, plan: Plan) -> Iterator[Row]:
    """Yield a row per candidate: forward and backward together, and the ratio to the table.

    A candidate that does not compile or computes wrongly has a row without a number. A candidate
    that the time limit excludes has no row.
    """
    device = plan.device
    candidates = tuning.candidates(kernel, **_shape(case, device))[: plan.most or None]
    blank = Row(
        suite="sweep", case=str(case), metric=kernel, shape=case.shape, peer="", version=None,
        unit="s", value=None, baseline=_TABLE, machine=describe(device),
        bytes=case.bytes("forward") + case.bytes("backward"),
        flops=case.flops("forward") + case.flops("backward"),
    )  # fmt: skip
    edit = tensors(case, device)
    operator = operator_of("triton", case, edit)
    feeding = _feeding(case, edit, plan.effort) if device.type == "cuda" else 0.0
    table: Run | None = None
    for settings, gate in _checked_in_batches(case, kernel, candidates, plan):
        if plan.over:
            return
        row = dataclasses.replace(
            blank,
            peer=_TABLE if settings is candidates[0] else tuning.label(settings),
            shape={**case.shape, "settings": dataclasses.asdict(settings)},
            gate=gate,
        )
        if not gate.passed:
            yield dataclasses.replace(row, absent=gate.says)
            continue
        try:
            with tuning.trial(kernel, settings):  # a graph keeps the settings of its capture
                run = _timed(case, operator, edit, device)
        except RuntimeError as error:
            yield dataclasses.replace(row, absent=first_line(error))
            continue
        if device.type != "cuda":
            run = partial(_with_settings, kernel, settings, run)
        table = table or run
        samples = interleave({"candidate": run, _TABLE: table}, plan.effort)
        both = {name: _together(phases, feeding) for name, phases in samples.items()}
        yield row.with_rounds(both["candidate"], both[_TABLE])


def _checked_in_batches(
    case: OpCase, kernel: str, candidates: Sequence[tuning.KernelConfig], plan: Plan
) -> Iterator[tuple[tuning.KernelConfig, Gate]]:
    """Yield candidates with their gates; no check runs while the caller times a candidate."""
    for begin in range(0, len(candidates), plan.jobs):
        if plan.over:
            return
        batch = candidates[begin : begin + plan.jobs]
        jobs = [Job(case, kernel, settings, str(plan.device)) for settings in batch]
        yield from zip(batch, list(plan.pool.map(check_candidate, jobs)), strict=True)


def _timed(case: OpCase, operator: Operator, edit: Edit, device: torch.device) -> Run:
    """Time forward and backward: on a GPU from a graph of both, including feeding."""
    if device.type != "cuda":
        return calls_of(Clock(device), Workload(operator, edit.hidden, edit.upstream))
    workloads = cold_workloads(case, operator, edit)
    return graph_run("both", [workload.whole for workload in workloads])


def _with_settings(kernel: str, settings: tuning.KernelConfig, run: Run) -> Mapping[str, float]:
    with tuning.trial(kernel, settings):
        return run()


def _feeding(case: OpCase, edit: Edit, effort: Effort) -> float:
    """Seconds of the same graph with an operator that does nothing: the cost of feeding."""
    nothing = Operator(lambda hidden: hidden, {})
    run = graph_run("both", [workload.whole for workload in cold_workloads(case, nothing, edit)])
    return quantiles(interleave({"nothing": run}, effort)["nothing"]["both"]).median


def winners(
    case: OpCase, kernel: str, rows: Sequence[Row], device: torch.device
) -> list[dict[str, Any]]:
    """The table's new entry for a case; an empty list if no candidate beats the table.

    The entry is the fastest candidate, if its ratio to the table is at most :data:`GAIN`.
    """
    timed = [row for row in rows if row.ratio is not None and row.peer != _TABLE]
    best = min(timed, key=lambda row: row.ratio or 1.0, default=None)
    if best is None or best.ratio is None or best.ratio > GAIN:
        return []
    return [
        tuning.entry(
            kernel, tuning.KernelConfig(**best.shape["settings"]), **_shape(case, device),
            case=str(case), commit=best.machine["commit"], ratio=round(best.ratio, 4),
        )
    ]  # fmt: skip


def check_candidate(job: Job) -> Gate:
    """Compile and run a candidate in a worker process, and compare it with float64."""
    edit, gate = _case_with_gate(job.case, job.device)
    try:
        with tuning.trial(job.kernel, job.settings):
            operator = operator_of("triton", job.case, edit)
            workload = Workload(operator, edit.hidden, edit.upstream)
            return gate.check(result_of(*workload.result()), within_budget=True)
    except Exception as error:  # of the compiler or the launcher
        return Gate(False, f"{type(error).__name__}: {first_line(error)}")


@functools.lru_cache(maxsize=1)
def _case_with_gate(case: OpCase, device: str) -> tuple[Any, OpGate]:
    torch.set_num_threads(1)
    edit = tensors(case, torch.device(device))
    return edit, OpGate(case, edit)


def _shape(case: OpCase, device: torch.device) -> dict[str, Any]:
    return {
        "dim": case.dim,
        "rank": case.rank,
        "num_rows": case.rows,
        "dtype": DTYPES[case.dtype],
        "target": tuning.target_of(device),
        "device": tuning.device_name(device),
    }


def _check_triton(case: OpCase, device: torch.device) -> None:
    """Raise ValueError unless Triton runs on the device."""
    edit = tensors(case, device)
    parts = (edit.hidden, edit.plan, edit.encode, edit.bias, edit.decode)
    explain(*parts, **edit.options, backend="triton")


def _together(phases: Mapping[str, Sequence[float]], feeding: float) -> list[float]:
    """Seconds of forward plus backward in each round, without feeding."""
    return [sum(seconds) - feeding for seconds in zip(*phases.values(), strict=True)]


def _summary(rows: Sequence[Row]) -> str:
    timed = [row for row in rows if row.ratio is not None]
    if not rows:
        return "not reached"
    if not timed:
        return f"none of {len(rows)} ran: {rows[0].absent}"
    best = min(timed, key=lambda row: row.ratio or 1.0)
    return f"{len(timed)} of {len(rows)} ran; best {best.peer}, {best.ratio:.3f} × the table"
