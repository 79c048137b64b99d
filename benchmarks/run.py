"""The commands ``python -m benchmarks run`` and ``list``: measure suites and write rows."""

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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import default_device, folder_name
from benchmarks.peers import Peer, peers
from benchmarks.report.number_format import quantity
from benchmarks.result_rows import RESULTS, Row, Writer
from benchmarks.suites import SIZES, Options, Suite, suites
from benchmarks.timing import Effort


def list_suites() -> None:
    """List the suites, and the peers with their versions."""
    console = Console()
    table = Table("suite", "what it measures", "cases: " + ", ".join(SIZES))
    for suite in suites().values():
        table.add_row(
            suite.name, suite.title, ", ".join(str(len(suite.cases(size))) for size in SIZES)
        )
    console.print(table)
    peer_table = Table("peer", "version", "takes part in", "note")
    for peer in peers():
        builders = {"edit": "op", "rotation": "orthonormal", "wrap": "models", "load": "load"}
        parts = [name for field, name in builders.items() if getattr(peer, field) is not None]
        peer_table.add_row(peer.name, peer.version or "–", ", ".join(parts), peer.note or "")
    console.print(peer_table)


def run_suites(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[SUITE]…", help="Default: all suites.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help=f"{', '.join(SIZES)}. Default: the size of the device.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: a GPU if there is one.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--peer", help="Run only this peer; may be repeated. See `list`."),
    ] = None,
    match: Annotated[str, typer.Option(help="Run only cases whose id contains this text.")] = "",
    seconds: Annotated[float, typer.Option(min=0, help="Seconds per case.")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, help="Minimum number of rounds.")] = 5,
    limit: Annotated[
        float, typer.Option(min=0, help="Start no case after this many seconds; 0 for no limit.")
    ] = 0.0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    jobs: Annotated[
        int,
        typer.Option(
            min=0, help="Processes that compile ahead while nothing is timed; up to 2 GiB each."
        ),
    ] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the JSON rows. Default: results/<device>.")
    ] = None,
) -> None:
    """Measure suites: check each case, time it, and write JSON rows."""
    try:
        selected = _selected_suites(names or [], suites())
        target = requested_device(device)
        participants = _selected_peers(only or [], peers())
        size = size or target.type.replace("cuda", "gpu")
        if size not in SIZES:
            raise ValueError(f"--size takes {', '.join(SIZES)}, got {size!r}")
    except ValueError as error:
        stop(str(error), 2)
    torch.set_num_threads(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of peers on a newer transformers
    options = Options(target, participants, Effort(seconds, min_rounds=rounds))
    folder = output or RESULTS / folder_name(target)
    session = _Run(options, Writer(folder), Console(), jobs, limit)
    for suite in selected:
        cases = [case for case in suite.cases(size) if match in str(case)]
        if not cases:
            stop(f"no case of {suite.name} ({size}) contains {match!r}", 2)
        session.run(suite, cases)
    session.console.print(f"written to {folder}")
    if session.failures:
        stop("not passed: " + "; ".join(dict.fromkeys(session.failures)), 1)


@dataclass(slots=True)
class _Run:
    """A run of suites: settings, output, and the failures so far."""

    options: Options
    writer: Writer
    console: Console
    jobs: int
    limit: float
    failures: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def run(self, suite: Suite, cases: Sequence[Any]) -> None:
        """Measure cases of a suite until the time limit; a case that fails does not stop others."""
        device, jobs = self.options.device, self.jobs
        for number, case in enumerate(cases, 1):
            if self.limit and time.perf_counter() - self.began > self.limit:
                left = len(cases) - number + 1
                self.console.print(
                    f"{suite.name}: time limit reached, {left} of {len(cases)} cases not run"
                )
                break
            try:
                release(device)
                if jobs and suite.warm is not None and number % jobs == 1 % jobs:
                    ahead = cases[number - 1 :][:jobs]
                    _warm(suite.name, ahead, device, [peer.name for peer in self.options.peers])
                self.console.print(f"[bold]{suite.name}[/] {case} ({number} of {len(cases)})")
                self._measure(suite, case)
            except Exception as error:  # the failure of this case
                self.console.print_exception()
                self.failures.append(f"{suite.name} {case}: {type(error).__name__}: {error}"[:300])

    def _measure(self, suite: Suite, case: Any) -> None:
        for row in self.writer.write(suite.run(case, self.options)):
            self.console.print(_line(row), highlight=False)
            if row.gate is not None and not row.gate.passed:
                self.failures.append(f"{row.suite} {row.case} {row.peer}: {row.gate.says}")


def _warm(suite: str, cases: Sequence[Any], device: torch.device, names: list[str]) -> None:
    """Compile the builds of these cases, each in a process that then exits and frees the device."""
    spawned = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    # A process that dies only means that its case compiles later.
    with (
        suppress(BrokenProcessPool),
        ProcessPoolExecutor(len(cases), mp_context=spawned) as pool,
    ):
        list(pool.map(partial(_warm_case, suite, str(device), names), cases))


def _warm_case(suite: str, device: str, names: list[str], case: Any) -> None:
    torch.set_num_threads(1)
    warm = suites()[suite].warm
    assert warm is not None
    warm(case, Options(torch.device(device), _selected_peers(names, peers())))


def release(device: torch.device) -> None:
    """Free the memory of a case.

    Models with hooks are reference cycles, and CUDA's allocator keeps freed memory to itself.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _selected_suites(names: Sequence[str], known: dict[str, Suite]) -> list[Suite]:
    for name in names:
        if name not in known:
            raise ValueError(f"SUITE must be one of {', '.join(known)}; got {name!r}")
    return [known[name] for name in dict.fromkeys(names or known)]


def _selected_peers(names: Sequence[str], known: Sequence[Peer]) -> list[Peer]:
    by_name = {peer.name: peer for peer in known}
    for name in names:
        if name not in by_name:
            raise ValueError(f"--peer must be one of {', '.join(by_name)}; got {name!r}")
    return [by_name[name] for name in dict.fromkeys(names or by_name)]


def requested_device(name: str | None) -> torch.device:
    """The device of ``--device``; raises ValueError if the machine does not have it."""
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
    """Print a line on stderr and exit with a status."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(status)
