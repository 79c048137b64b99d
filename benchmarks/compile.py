"""The command ``python -m benchmarks compile``: resources of every kernel build, without a GPU.

It reports registers, shared memory and spills. A build that spills registers to memory is an error,
and so is a wgmma with an operand in registers (see ``reft_kernels/README.md``). The command then
exits with status 1 and names the builds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.run import stop
from reft_kernels.devtools import compile_report

DIMS = (768, 2048, 4096, 8192)
RANKS = (1, 4, 8, 16, 32, 64, 128, 200, 256)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BUILD = ("target", "kernel", "variant", "D", "r", "dtype", "rows")
_RESOURCES = ("registers", "shared", "stack", "spills", "scalar_spills", "register_wgmma")


def _joined(values: Sequence[Any] | dict[str, Any]) -> str:
    return ",".join(map(str, values))


@dataclass(frozen=True, slots=True)
class _Job:
    target: str
    build: compile_report.Build


def compile_kernels(
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target", help=f"{', '.join(compile_report.TARGETS)}; may be repeated. Default: all."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per line.")
    ] = False,
    dims: Annotated[str, typer.Option(help="D, separated by commas.")] = _joined(DIMS),
    ranks: Annotated[str, typer.Option(help="r, separated by commas.")] = _joined(RANKS),
    dtypes: Annotated[
        str, typer.Option(help="Dtypes of the hidden states, separated by commas.")
    ] = _joined(DTYPES),
    rows: Annotated[
        str, typer.Option(help="n, on which settings depend, separated by commas.")
    ] = _joined(compile_report.ROWS),
    kernels: Annotated[str, typer.Option(help="Kernels, separated by commas.")] = _joined(
        compile_report.KERNELS
    ),
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes.")] = os.cpu_count() or 1,
) -> None:
    """Compile every kernel build for a target and print its resources."""
    try:
        todo = _jobs(targets or list(compile_report.TARGETS), dims, ranks, dtypes, rows, kernels)
    except (ValueError, RuntimeError) as error:
        stop(str(error), 2)

    progress = Console(stderr=True)
    table = Table(*_BUILD, *_RESOURCES, title="bytes of memory; stack and spills are per thread")
    bad = []
    rows_of_builds = _compiled(todo, min(jobs, len(todo)))
    for row in track(
        rows_of_builds, "compiling", total=len(todo), console=progress, transient=True
    ):
        if row["error"] or row["spills"] or row["register_wgmma"]:
            bad.append(row)
        if as_json:
            typer.echo(json.dumps(row))
        else:
            table.add_row(
                *("–" if row[key] is None else str(row[key]) for key in _BUILD + _RESOURCES)
            )
    if not as_json:
        console = Console()
        # Without a terminal rich would cut the table to 80 columns.
        (console if console.is_terminal else Console(width=140)).print(table)
    if bad:
        stop(f"{len(bad)} of {len(todo)} builds: {'; '.join(map(_complaint, bad))}", 1)


def _jobs(
    targets: Sequence[str], dims: str, ranks: str, dtypes: str, rows: str, kernels: str
) -> list[_Job]:
    """The requested builds, target by target.

    Raises:
        ValueError: an option has a value that it does not take.
        RuntimeError: Triton cannot compile for a target here.
    """
    for target in targets:
        compile_report.check_target(target)
    dtype_names = _names("dtypes", dtypes, DTYPES)
    selected = _names("kernels", kernels, compile_report.KERNELS)
    matrix = [
        build
        for build in compile_report.builds(
            _integers("dims", dims),
            _integers("ranks", ranks),
            tuple(DTYPES[name] for name in dtype_names),
            _integers("rows", rows),
        )
        if build.kernel in selected
    ]
    return [_Job(target, build) for target in dict.fromkeys(targets) for build in matrix]


def _integers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--{option} takes positive integers separated by commas, got {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))


def _names(option: str, text: str, allowed: Sequence[str] | dict[str, Any]) -> tuple[str, ...]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in allowed:
            raise ValueError(f"--{option} takes {', '.join(allowed)}, got {part!r}")
    return tuple(dict.fromkeys(parts))


def _compiled(todo: Sequence[_Job], workers: int) -> Iterator[dict[str, Any]]:
    """Yield a row per job, in order."""
    if workers == 1:
        yield from map(_compile, todo)
        return
    # Spawned, not forked: torch and the progress bar have threads.
    with ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=single_thread
    ) as pool:
        yield from pool.map(_compile, todo)


def single_thread() -> None:
    """Limit PyTorch to one thread; several processes compile at the same time."""
    torch.set_num_threads(1)


def _compile(job: _Job) -> dict[str, Any]:
    build = job.build
    row: dict[str, Any] = {
        "target": job.target,
        "kernel": build.kernel,
        "variant": build.variant,
        "D": build.dim,
        "r": build.rank,
        "dtype": next(name for name, dtype in DTYPES.items() if dtype is build.dtype),
        "rows": build.num_rows,
        **dict.fromkeys(_RESOURCES),
        "triton": version("triton"),
        "error": None,
    }
    try:
        row |= compile_report.compile_build(build, job.target).as_dict()
    except Exception as error:  # of the compiler; the other builds go on
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def _complaint(row: dict[str, Any]) -> str:
    name = "{target} {kernel} {variant} D={D} r={r} {dtype} n={rows}".format(**row)
    if row["error"]:
        return f"{name}: {row['error']}"
    if row["spills"]:
        return f"{name}: {row['spills']} bytes spilled"
    return f"{name}: {row['register_wgmma']} wgmma with an operand in registers"
