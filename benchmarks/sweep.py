"""``python -m benchmarks sweep``: find launch settings on a device, for the frozen table.

One kernel's settings are varied at a time, the other keeps the table's. Candidates are compiled and
checked against float64 by worker processes, a batch at a time; what passed is timed alone, in turns
with the table's settings, forward and backward together. ``settings.json`` is then the table with
the winners in it, written anew after every candidate: copied over
``reft_kernels/_triton/measured.json`` it is what users get.
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
from benchmarks.run import chosen_device, release, stop
from benchmarks.suites.op import Stand, calls_of, cold_stands, first_line, tensors
from benchmarks.timing import (
    Clock,
    Effort,
    Run,
    failed_capture,
    graph_run,
    interleave,
    paired_ratio,
    quantiles,
)
from reft_kernels import explain, tuning
from reft_kernels.testing import Edit

#: A candidate takes the table's place from here on: less is within the noise of a run.
GAIN = 0.97
_TABLE = "table"
#: Processes that judge by default: a GPU's memory is for all of them, see ``footprint.py``.
JOBS = 4
_EFFORTS = {"ci": Effort(0, 2, 2, warmup=1), "gpu": Effort(0.05, 5, 30)}


@dataclass(frozen=True, slots=True)
class Job:
    """One candidate of one kernel in one case."""

    case: OpCase
    kernel: str
    settings: tuning.KernelConfig
    device: str


def cases(size: str) -> list[OpCase]:
    """Prompt ends and every row, by rank and dtype; those that most people run come first.

    Prompt ends lie in sequences of 16: longer ones are the same work in more memory.
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
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU if any.")] = None,
    size: Annotated[
        str, typer.Option(help=f"{', '.join(_EFFORTS)} (one small shape, for trying it).")
    ] = "gpu",
    match: Annotated[str, typer.Option(help="Take only cases whose id contains this.")] = "",
    limit: Annotated[
        float,
        typer.Option(min=0, help="Start no candidate after so many seconds; 0 for no limit."),
    ] = 0.0,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes that compile and check, up to 4 GiB each.")
    ] = min(JOBS, os.cpu_count() or 1),
    most: Annotated[int, typer.Option(min=0, help="Candidates of a kernel; 0 for all.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results. Default: results/<device>.")
    ] = None,
) -> None:
    """Time launch settings of the Triton kernels and write a table of the fastest."""
    try:
        where = chosen_device(device)
        if size not in _EFFORTS:
            raise ValueError(f"--size takes {', '.join(_EFFORTS)}, got {size!r}")
        if where.type == "cpu" and size != "ci":
            raise ValueError("without a GPU only --size ci can be swept, by TRITON_INTERPRET=1")
        wanted = [case for case in cases(size) if match in str(case)]
        if not wanted:
            raise ValueError(f"no case of the sweep ({size}) contains {match!r}")
        _check_triton(wanted[0], where)
    except ValueError as error:
        stop(str(error), 2)
    folder = output or RESULTS / folder_name(where)
    folder.mkdir(parents=True, exist_ok=True)
    console, writer = Console(), Writer(folder)
    found: list[dict[str, Any]] = []
    until = time.perf_counter() + limit if limit else None
    # Spawned, not forked: a CUDA context does not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        plan = Plan(where, pool, jobs, _EFFORTS[size], most, until)
        for number, case in enumerate(wanted):
            if plan.over:
                says = failed_capture() or "time is over"
                console.print(f"{says}; {len(wanted) - number} of {len(wanted)} cases not run")
                break
            console.print(f"[bold]sweep[/] {case} ({number + 1} of {len(wanted)})")
            release(where)
            for kernel in tuning.KERNELS:
                rows: list[Row] = []
                for row in writer.write(sweep_case(case, kernel, plan)):
                    rows.append(row)
                    entries = found + winners(case, kernel, rows, where)
                    replace_file(folder / "settings.json", tuning.updated_table(entries).encode())
                found += winners(case, kernel, rows, where)
                console.print(f"  {kernel}: {_summary(rows)}", highlight=False)
    console.print(f"{len(found)} settings beat the table, written to {folder}")


@dataclass(frozen=True, slots=True)
class Plan:
    """How to sweep.

    Attributes:
        pool: of ``jobs`` processes that judge.
        most: candidates of a kernel; 0 for all.
        until: when to stop, by ``time.perf_counter``; None for no limit.
    """

    device: torch.device
    pool: Executor
    jobs: int
    effort: Effort
    most: int = 0
    until: float | None = None

    @property
    def over(self) -> bool:
        """Whether no candidate is to be started any more."""
        late = self.until is not None and time.perf_counter() > self.until
        return late or failed_capture() is not None


def sweep_case(case: OpCase, kernel: str, plan: Plan) -> Iterator[Row]:
    """One row a candidate: forward and backward together, and the ratio to the table's settings.

    A candidate that does not compile or is wrong has a row without a number. Those that the time
    does not reach have no row.
    """
    device = plan.device
    tried = tuning.candidates(kernel, **_shape(case, device))[: plan.most or None]
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
    for settings, gate in _judged_in_batches(case, kernel, tried, plan):
        if plan.over:
            return
        place = settings is tried[0]
        row = dataclasses.replace(
            blank,
            peer=_TABLE if place else tuning.label(settings),
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
        yield row.timed(quantiles(both["candidate"]), paired_ratio(both["candidate"], both[_TABLE]))


def _judged_in_batches(
    case: OpCase, kernel: str, tried: Sequence[tuning.KernelConfig], plan: Plan
) -> Iterator[tuple[tuning.KernelConfig, Gate]]:
    """Candidates with their gates; nothing is judged while the caller times one of them."""
    for begin in range(0, len(tried), plan.jobs):
        if plan.over:
            return
        batch = tried[begin : begin + plan.jobs]
        jobs = [Job(case, kernel, settings, str(plan.device)) for settings in batch]
        yield from zip(batch, list(plan.pool.map(judge, jobs)), strict=True)


def _timed(case: OpCase, operator: Operator, edit: Edit, device: torch.device) -> Run:
    """Forward and backward: on a GPU one graph of both, with their feeding."""
    if device.type != "cuda":
        return calls_of(Clock(device), Stand(operator, edit.hidden, edit.upstream))
    stands = cold_stands(case, operator, edit)
    return graph_run("both", [stand.whole for stand in stands])


def _with_settings(kernel: str, settings: tuning.KernelConfig, run: Run) -> Mapping[str, float]:
    with tuning.trial(kernel, settings):
        return run()


def _feeding(case: OpCase, edit: Edit, effort: Effort) -> float:
    """Seconds of the same graph with an operator that does nothing: what a stand costs itself."""
    nothing = Operator(lambda hidden: hidden, {})
    run = graph_run("both", [stand.whole for stand in cold_stands(case, nothing, edit)])
    return quantiles(interleave({"nothing": run}, effort)["nothing"]["both"]).median


def winners(
    case: OpCase, kernel: str, rows: Sequence[Row], device: torch.device
) -> list[dict[str, Any]]:
    """The table's new entry for this case: its fastest candidate, if that is faster than the
    table's settings beyond the noise."""
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


def judge(job: Job) -> Gate:
    """Compile and run a candidate and compare with float64; in a worker process."""
    edit, gate = _judged(job.case, job.device)
    try:
        with tuning.trial(job.kernel, job.settings):
            operator = operator_of("triton", job.case, edit)
            stand = Stand(operator, edit.hidden, edit.upstream)
            return gate.check(result_of(*stand.result()), own=True)
    except Exception as error:  # a compiler's or launcher's own: this candidate is out
        return Gate(False, f"{type(error).__name__}: {first_line(error)}")


@functools.lru_cache(maxsize=1)
def _judged(case: OpCase, device: str) -> tuple[Any, OpGate]:
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
    """ValueError unless Triton runs on this device."""
    edit = tensors(case, device)
    parts = (edit.hidden, edit.plan, edit.encode, edit.bias, edit.decode)
    explain(*parts, **edit.options, backend="triton")


def _together(phases: Mapping[str, Sequence[float]], feeding: float) -> list[float]:
    """Forward plus backward, round by round, without their feeding; seconds."""
    return [sum(one) - feeding for one in zip(*phases.values(), strict=True)]


def _summary(rows: Sequence[Row]) -> str:
    timed = [row for row in rows if row.ratio is not None]
    if not rows:
        return "not reached"
    if not timed:
        return f"none of {len(rows)} ran: {rows[0].absent}"
    best = min(timed, key=lambda row: row.ratio or 1.0)
    return f"{len(timed)} of {len(rows)} ran; best {best.peer}, {best.ratio:.3f} × the table"
