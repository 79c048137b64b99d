"""The command ``python -m benchmarks gpu``: a whole session on a GPU within nine minutes.

Each stage is a process with a time budget (``stages.py``). Rows and logs go to a scratch folder,
which is packed into a few files after every stage and every ten seconds. Each file is replaced
atomically. If the command is killed, the files hold all that was measured until then.
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
from benchmarks.gpu_session.summary import render_summary
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
    budget: Annotated[
        float, typer.Option(min=10, max=540, help="Seconds for the whole session.")
    ] = sum(BUDGETS.values()),
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Run tiny shapes with interpreted kernels; needs no GPU.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option("--stage", help="Run only this stage; may be repeated.")
    ] = None,
    commit: Annotated[
        str | None,
        typer.Option(help="Commit to record in rows. Default: git's commit, or ids of its trees."),
    ] = None,
) -> None:
    """Run parity tests, every suite, the sweep and the report on a GPU, within nine minutes."""
    known = {stage.name: stage for stage in stages(tiny)}
    for name in only or ():
        if name not in known:
            stop(f"--stage takes {', '.join(known)}, got {name!r}", 2)
    if not tiny and not torch.cuda.is_available():
        stop("this machine has no CUDA device; --tiny runs without one", 2)
    if commit is not None:
        os.environ["REFT_COMMIT"] = commit
    device = torch.device("cpu" if tiny else "cuda")
    folder = (output or ROOT / "build" / "gpu" / folder_name(device)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    selected = [stage for name, stage in known.items() if not only or name in only]
    with tempfile.TemporaryDirectory(prefix="reft-gpu-") as scratch:
        session = Session(
            folder, Path(scratch), folder_name(device), describe(device), tiny,
            [stage.name for stage in selected], Console(),
        )  # fmt: skip
        environment = environment_of(tiny, session.machine["commit"])
        outcomes = run_stages(selected, budget, session.scratch, environment, session.report)
    session.console.print(f"written to {folder}")
    if any(outcome.ended != "passed" for outcome in outcomes):
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class Session:
    """The files that a session returns, complete at every moment.

    Attributes:
        home: the folder of the three files that are returned.
        scratch: the folder of rows and logs while stages run.
        top: the name of the folder in the archive: that of the device.
        machine: the result of ``machine.describe``.
        tiny: whether the session runs without a GPU.
        stage_names: the names of the stages.
    """

    home: Path
    scratch: Path
    top: str
    machine: dict[str, Any]
    tiny: bool
    stage_names: Sequence[str]
    console: Console

    def report(self, outcomes: Sequence[Outcome], running: str | None) -> None:
        """Rewrite the archive, the summary and the settings.

        An OSError, as of a full disk, is printed; the next report tries again.
        """
        try:
            self._write(outcomes, running)
        except OSError as error:
            self.console.print(f"report not written: {error}", highlight=False)

    def _write(self, outcomes: Sequence[Outcome], running: str | None) -> None:
        record = {
            "machine": self.machine,
            "tiny": self.tiny,
            "running": running,
            "stages": [asdict(outcome) for outcome in outcomes],
        }
        session = json.dumps(record, indent=1) + "\n"
        (self.scratch / "session.json").write_text(session, encoding="utf-8")
        content, left_out = pack(self.scratch, self.top)
        replace_file(self.home / "results.tar.gz", content)
        notes = []
        if left_out:
            notes = [f"results.tar.gz is limited in size and lacks {' and '.join(left_out)}."]
        page = render_summary(
            self.machine, self.stage_names, outcomes, running, self.scratch, notes
        )
        replace_file(self.home / "summary.md", page.encode())
        settings = self.scratch / "settings.json"
        if settings.exists():
            replace_file(self.home / "settings.json", settings.read_bytes())


def environment_of(tiny: bool, commit: str | None) -> dict[str, str]:
    """The environment variables of every stage."""
    environment = {**os.environ, **ENVIRONMENT}
    environment.pop("TRITON_INTERPRET", None)
    if tiny:
        environment["TRITON_INTERPRET"] = "1"
    if commit is not None:
        environment["REFT_COMMIT"] = commit
    return environment
