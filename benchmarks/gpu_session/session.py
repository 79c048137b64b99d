"""``python -m benchmarks gpu``: all that a session on a GPU needs, in one command of nine minutes.

Each stage is a process of its own within a budget (``stages.py``). Rows and logs go to a scratch
folder; what is there is packed into a few files after every stage and every ten seconds, each
replaced at once, so that whatever ends the command, what was measured is at home.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.gpu_session.archive import pack
from benchmarks.gpu_session.stages import BUDGETS, ENVIRONMENT, Outcome, run_stages, stages
from benchmarks.gpu_session.summary import render
from benchmarks.machine import ROOT, describe, folder_name
from benchmarks.result_rows import replace_file
from benchmarks.run import stop


def run_session(
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of results.tar.gz, summary.md and settings.json. "
            "Default: build/gpu/<device> in the checkout."
        ),
    ] = None,
    budget: Annotated[float, typer.Option(min=10, max=540, help="Seconds for all of it.")] = sum(
        BUDGETS.values()
    ),
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Tiny shapes, the kernels interpreted: no GPU is needed.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option("--stage", help="Only this stage; may be repeated.")
    ] = None,
    commit: Annotated[
        str | None,
        typer.Option(help="What rows call the code. Default: git's commit, or ids of its trees."),
    ] = None,
) -> None:
    """Parity, every suite, the sweep, tables and plots on a GPU, within nine minutes."""
    known = {stage.name: stage for stage in stages(tiny)}
    for name in only or ():
        if name not in known:
            stop(f"--stage must be one of {', '.join(known)}; got {name!r}", 2)
    if not tiny and not torch.cuda.is_available():
        stop("this machine has no CUDA device; --tiny tries everything without one", 2)
    if commit is not None:
        os.environ["REFT_COMMIT"] = commit
    device = torch.device("cpu" if tiny else "cuda")
    folder = (output or ROOT / "build" / "gpu" / folder_name(device)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [stage for name, stage in known.items() if not only or name in only]
    with tempfile.TemporaryDirectory(prefix="reft-gpu-") as scratch:
        session = Session(
            folder, Path(scratch), folder_name(device), describe(device), tiny,
            [stage.name for stage in wanted], Console(),
        )  # fmt: skip
        environment = environment_of(tiny, session.machine["commit"])
        outcomes = run_stages(wanted, budget, session.scratch, environment, session.report)
    session.console.print(f"written to {folder}")
    if any(one.ended != "passed" for one in outcomes):
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class Session:
    """What comes home of a session, whole at every moment.

    Attributes:
        home: folder of the three files that come home.
        scratch: folder of rows and logs while stages run.
        top: the folder in the archive, the device's.
        machine: what ``machine.describe`` says.
        tiny: whether it is a try without a GPU.
        wanted: names of the stages.
    """

    home: Path
    scratch: Path
    top: str
    machine: dict[str, Any]
    tiny: bool
    wanted: Sequence[str]
    console: Console

    def report(self, outcomes: Sequence[Outcome], running: str | None) -> None:
        """Write the archive, the summary and the settings anew.

        A disk that is full for a moment stops nothing: the next report tries again.
        """
        try:
            self._write(outcomes, running)
        except OSError as error:
            self.console.print(f"not written this time: {error}", highlight=False)

    def _write(self, outcomes: Sequence[Outcome], running: str | None) -> None:
        record = {
            "machine": self.machine,
            "tiny": self.tiny,
            "running": running,
            "stages": [asdict(one) for one in outcomes],
        }
        session = json.dumps(record, indent=1) + "\n"
        (self.scratch / "session.json").write_text(session, encoding="utf-8")
        content, left_out = pack(self.scratch, self.top)
        replace_file(self.home / "results.tar.gz", content)
        notes = [f"results.tar.gz would be too large: it lacks {' and '.join(left_out)}."]
        page = render(
            self.machine, self.wanted, outcomes, running, self.scratch, notes if left_out else ()
        )
        replace_file(self.home / "summary.md", page.encode())
        settings = self.scratch / "settings.json"
        if settings.exists():
            replace_file(self.home / "settings.json", settings.read_bytes())


def environment_of(tiny: bool, commit: str | None) -> dict[str, str]:
    """The variables of every stage."""
    environment = {**os.environ, **ENVIRONMENT}
    environment.pop("TRITON_INTERPRET", None)
    if tiny:
        environment["TRITON_INTERPRET"] = "1"
    if commit is not None:
        environment["REFT_COMMIT"] = commit
    return environment
