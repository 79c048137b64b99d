"""``python -m benchmarks run``: measure suites, print rows as they come, write them down."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import default_device, folder_name
from benchmarks.peers import Peer, peers
from benchmarks.report.tables import quantity
from benchmarks.result_rows import RESULTS, Row, Writer
from benchmarks.suites import SIZES, Options, Suite, suites
from benchmarks.timing import Effort


def list_suites() -> None:
    """The suites, and the peers with their versions."""
    console = Console()
    table = Table("suite", "what it measures", "cases: " + ", ".join(SIZES))
    for suite in suites().values():
        table.add_row(
            suite.name, suite.says, ", ".join(str(len(suite.cases(size))) for size in SIZES)
        )
    console.print(table)
    others = Table("peer", "version", "takes part in", "note")
    for peer in peers():
        parts = {"edit": "op", "rotation": "orthonormal", "wrap": "models", "load": "load"}
        found = [name for field, name in parts.items() if getattr(peer, field) is not None]
        others.add_row(peer.name, peer.version or "–", ", ".join(found), peer.note or "")
    console.print(others)


def run_suites(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[SUITE]…", help="Default: all of them.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help=f"{', '.join(SIZES)}. Default: that of the device.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU if any.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--peer", help="Take only this peer; may be repeated. See `list`."),
    ] = None,
    match: Annotated[str, typer.Option(help="Take only cases whose id contains this.")] = "",
    seconds: Annotated[float, typer.Option(min=0, help="To spend on each case.")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, help="At least so many.")] = 5,
    limit: Annotated[
        float, typer.Option(min=0, help="Start no case after so many seconds; 0 for no limit.")
    ] = 0.0,
    threads: Annotated[int, typer.Option(min=1, help="Of a CPU.")] = 1,
    jobs: Annotated[
        int,
        typer.Option(
            min=0, help="Processes that compile ahead, while nothing is timed; up to 2 GiB each."
        ),
    ] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the JSON rows. Default: results/<device>.")
    ] = None,
) -> None:
    """Measure suites; every number is checked first, and written as a JSON row."""
    try:
        chosen = _chosen(names or [], suites())
        where = chosen_device(device)
        picked = _picked(only or [], peers())
        kind = size or where.type.replace("cuda", "gpu")
        if kind not in SIZES:
            raise ValueError(f"--size takes {', '.join(SIZES)}, got {kind!r}")
    except ValueError as error:
        stop(str(error), 2)
    torch.set_num_threads(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)  # peers on a newer transformers
    options = Options(where, picked, Effort(seconds, min_rounds=rounds))
    folder = output or RESULTS / folder_name(where)
    console, writer, failed = Console(), Writer(folder), []
    began = time.perf_counter()
    for suite in chosen:
        cases = [case for case in suite.cases(kind) if match in str(case)]
        if not cases:
            stop(f"no case of {suite.name} ({kind}) contains {match!r}", 2)
        for number, case in enumerate(cases, 1):
            if limit and time.perf_counter() - began > limit:
                left = len(cases) - number + 1
                console.print(f"{suite.name}: time is over, {left} of {len(cases)} cases not run")
                break
            try:
                release(where)
                if jobs and suite.warm is not None and number % jobs == 1 % jobs:
                    ahead = cases[number - 1 :][:jobs]
                    _warm(suite.name, ahead, where, [one.name for one in picked])
                console.print(f"[bold]{suite.name}[/] {case} ({number} of {len(cases)})")
                for row in writer.write(suite.run(case, options)):
                    console.print(_line(row), highlight=False)
                    if row.gate is not None and not row.gate.passed:
                        failed.append(f"{row.suite} {row.case} {row.peer}: {row.gate.says}")
            except Exception as error:  # this case's own: the others go on
                console.print_exception()
                failed.append(f"{suite.name} {case}: {type(error).__name__}: {error}"[:300])
    console.print(f"written to {folder}")
    if failed:
        stop("not passed: " + "; ".join(dict.fromkeys(failed)), 1)


def _warm(suite: str, cases: Sequence[Any], device: torch.device, names: list[str]) -> None:
    """Compile what these cases need, each in a process that then ends and leaves the device."""
    spawned = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    # A process that dies takes its cases' head start along, not the run.
    with (
        suppress(BrokenProcessPool),
        ProcessPoolExecutor(len(cases), mp_context=spawned) as pool,
    ):
        list(pool.map(partial(_warm_one, suite, str(device), names), cases))


def _warm_one(suite: str, device: str, names: list[str], case: Any) -> None:
    torch.set_num_threads(1)
    warm = suites()[suite].warm
    assert warm is not None
    warm(case, Options(torch.device(device), _picked(names, peers())))


def release(device: torch.device) -> None:
    """Give back what a case took: models with hooks are cycles, and CUDA's allocator keeps what
    it has for its own process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _chosen(names: Sequence[str], known: dict[str, Suite]) -> list[Suite]:
    for name in names:
        if name not in known:
            raise ValueError(f"SUITE must be one of {', '.join(known)}; got {name!r}")
    return [known[name] for name in dict.fromkeys(names or known)]


def _picked(names: Sequence[str], known: Sequence[Peer]) -> list[Peer]:
    by_name = {peer.name: peer for peer in known}
    for name in names:
        if name not in by_name:
            raise ValueError(f"--peer must be one of {', '.join(by_name)}; got {name!r}")
    return [by_name[name] for name in dict.fromkeys(names or by_name)]


def chosen_device(name: str | None) -> torch.device:
    """The device of ``--device``; ValueError where this machine has none such."""
    if name is None:
        return default_device()
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device takes cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device")
    return torch.device(name)


def _line(row: Row) -> str:
    head = f"  {row.metric:>18}  {row.peer:<20}"
    if row.value is None:
        return f"{head} –  {row.absent}"
    ratio = "" if row.ratio is None else f"  {row.ratio:8.4f} × {row.baseline}"
    share = "" if row.share is None else f"  {row.share:6.1%} of a copy's bandwidth"
    return f"{head} {quantity(row.value, row.unit):>12}{ratio}{share}"


def stop(message: str, status: int) -> NoReturn:
    """One line on stderr, and the exit status."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(status)
