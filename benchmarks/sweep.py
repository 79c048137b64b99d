"""``python -m benchmarks sweep``: find launch settings on a device, for the frozen table.

One kernel's settings are varied at a time, the other keeps the table's. Every candidate is compiled
and checked against float64 in a worker process, in parallel; what passed is timed alone, in turns
with the table's settings, forward and backward together. ``settings.json`` is then the table with
the winners in it: copied over ``reft_kernels/_triton/measured.json`` it is what users get.
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
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.cases import DTYPES, OpCase
from benchmarks.gate import OpGate, result_of
from benchmarks.machine import describe, folder_name
from benchmarks.peers.ours import edit as operator_of
from benchmarks.records import RESULTS, Gate, Row, Writer
from benchmarks.run import chosen_device, stop
from benchmarks.suites.op import Stand, calls_of, first_line, graphs_of, tensors
from benchmarks.timing import Clock, Effort, Run, interleave, paired_ratio, quantiles
from reft_kernels import explain, tuning

#: A candidate takes the table's place from here on: less is within the noise of a run.
GAIN = 0.97
_TABLE = "table"
_EFFORTS = {"ci": Effort(0, 2, 2, warmup=1), "gpu": Effort(0.05, 5, 30)}


@dataclass(frozen=True, slots=True)
class Job:
    """One candidate of one kernel in one case."""

    case: OpCase
    kernel: str
    settings: tuning.KernelConfig
    device: str


def cases(size: str) -> list[OpCase]:
    """Prompt ends and every row, by rank and dtype; those that most people run come first."""
    if size == "ci":
        return [OpCase("f7+l7", 1, 16, 64, 4)]
    shapes = (("f7+l7", 32), ("all", 16))
    return [
        OpCase(positions, batch, 512, 4096, rank, dtype)
        for dtype in ("bf16", "fp32")
        for rank in (8, 32, 4, 1, 16, 64)
        for positions, batch in shapes
    ]


def sweep_settings(
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU if any.")] = None,
    size: Annotated[
        str, typer.Option(help=f"{', '.join(_EFFORTS)} (one small shape, for trying it).")
    ] = "gpu",
    match: Annotated[str, typer.Option(help="Take only cases whose id contains this.")] = "",
    limit: Annotated[
        float, typer.Option(min=0, help="Start no case after so many seconds; 0 for no limit.")
    ] = 0.0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that compile and check.")] = min(
        12, os.cpu_count() or 1
    ),
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
    console, writer, entries = Console(), Writer(folder), []
    began = time.perf_counter()
    # Spawned, not forked: a CUDA context does not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, case in enumerate(wanted):
            if limit and time.perf_counter() - began > limit:
                console.print(f"time is over, {len(wanted) - number} of {len(wanted)} not run")
                break
            console.print(f"[bold]sweep[/] {case} ({number + 1} of {len(wanted)})")
            for kernel in tuning.KERNELS:
                rows = list(writer.write(sweep_case(case, kernel, where, pool, size, most)))
                entries += winners(case, kernel, rows, where)
                console.print(f"  {kernel}: {_summary(rows)}", highlight=False)
    (folder / "settings.json").write_text(tuning.updated_table(entries), encoding="utf-8")
    console.print(f"{len(entries)} settings beat the table, written to {folder}")


def sweep_case(
    case: OpCase, kernel: str, device: torch.device, pool: Executor, size: str, most: int = 0
) -> Iterator[Row]:
    """One row a candidate: forward and backward together, and the ratio to the table's settings.

    A candidate that does not compile or is wrong has a row without a number.
    """
    shape = _shape(case, device)
    tried = tuning.candidates(kernel, **shape)[: most or None]
    jobs = [Job(case, kernel, settings, str(device)) for settings in tried]
    edit = tensors(case, device)
    operator = operator_of("triton", case, edit)
    blank = Row(
        suite="sweep", case=str(case), metric=kernel, shape=case.shape, peer="", version=None,
        unit="s", value=None, baseline=_TABLE, machine=describe(device),
        bytes=case.bytes("forward") + case.bytes("backward"),
        flops=case.flops("forward") + case.flops("backward"),
    )  # fmt: skip

    def timed(settings: tuning.KernelConfig) -> Run:
        if device.type == "cuda":  # settings are captured with the graph
            with tuning.trial(kernel, settings):
                return graphs_of(case, operator, edit)
        calls = calls_of(Clock(device), Stand(operator, edit.hidden, edit.upstream))

        def run() -> Mapping[str, float]:
            with tuning.trial(kernel, settings):
                return calls()

        return run

    table: Run | None = None
    gates = list(pool.map(judge, jobs))  # all of them: whatever is timed is timed alone
    for job, gate in zip(jobs, gates, strict=True):
        place = job.settings is tried[0]
        row = dataclasses.replace(
            blank,
            peer=_TABLE if place else tuning.label(job.settings),
            shape={**case.shape, "settings": dataclasses.asdict(job.settings)},
            gate=gate,
        )
        if not gate.passed:
            yield dataclasses.replace(row, absent=gate.says)
            continue
        try:
            run = timed(job.settings)
        except RuntimeError as error:
            yield dataclasses.replace(row, absent=first_line(error))
            continue
        table = table or run
        samples = interleave({"candidate": run, _TABLE: table}, _EFFORTS[size])
        both = {name: _together(phases) for name, phases in samples.items()}
        yield row.timed(quantiles(both["candidate"]), paired_ratio(both["candidate"], both[_TABLE]))


def winners(
    case: OpCase, kernel: str, rows: Sequence[Row], device: torch.device
) -> list[dict[str, Any]]:
    """The table's new entry for this case: its fastest candidate, if that is faster than the
    table's settings beyond the noise."""
    timed = [row for row in rows if row.ratio is not None and row.peer != _TABLE]
    best = min(timed, key=lambda row: row.ratio or 1.0, default=None)
    if best is None or best.ratio is None or best.ratio > GAIN:
        return []
    machine = best.machine
    return [
        tuning.entry(
            kernel, tuning.KernelConfig(**best.shape["settings"]), **_shape(case, device),
            device=machine["device"], commit=machine["commit"], case=str(case),
            ratio=round(best.ratio, 4),
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
    }


def _check_triton(case: OpCase, device: torch.device) -> None:
    """ValueError unless Triton runs on this device."""
    edit = tensors(case, device)
    parts = (edit.hidden, edit.plan, edit.encode, edit.bias, edit.decode)
    explain(*parts, **edit.options, backend="triton")


def _together(phases: Mapping[str, Sequence[float]]) -> list[float]:
    """Forward plus backward, round by round."""
    return [sum(one) for one in zip(*phases.values(), strict=True)]


def _summary(rows: Sequence[Row]) -> str:
    timed = [row for row in rows if row.ratio is not None]
    if not timed:
        return f"none of {len(rows)} ran: {rows[0].absent}"
    best = min(timed, key=lambda row: row.ratio or 1.0)
    return f"{len(timed)} of {len(rows)} ran; best {best.peer}, {best.ratio:.3f} × the table"
