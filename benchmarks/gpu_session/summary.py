"""The summary of a session as Markdown: stages, failed tests, and the tables of the report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_session.stages import TESTS, Outcome
from benchmarks.report.tables import markdown

_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+(?:\[.*?\])?)(?: - (.*))?$", re.MULTILINE)
_SUMMARY = re.compile(r"^=*\s*((?:\d+ \w+,? ?)+in \d.*?)\s*=*$", re.MULTILINE)
_MACHINE = ("device", "driver", "python", "torch", "triton", "transformers", "cores", "commit")


def render_summary(
    machine: Mapping[str, Any],
    stage_names: Sequence[str],
    outcomes: Sequence[Outcome],
    running: str | None,
    folder: Path,
    notes: Sequence[str] = (),
) -> str:
    """Write the summary of a session that may still run.

    Args:
        machine: the result of ``machine.describe``.
        stage_names: names of the stages, in order.
        running: the name of the running stage; None after the last.
        folder: the folder of rows and logs.
        notes: lines for the top of the page.
    """
    parts = ["# A session on a GPU", *notes]
    parts.append(markdown(["", ""], [[name, str(machine[name])] for name in _MACHINE], left=2))
    parts += ["## Stages", _stages(stage_names, outcomes, running)]
    for name in TESTS:
        log = folder / f"{name}.log"
        if log.exists():
            text = log.read_text(encoding="utf-8", errors="replace")
            parts += [f"## Tests of {name}", *pytest_summary(text)]
    page = folder / "report" / "report.md"
    if page.exists():
        lines = page.read_text(encoding="utf-8").splitlines()
        parts.append("\n".join(line for line in lines if not line.startswith("![")))
    return "\n\n".join(parts) + "\n"


def pytest_summary(log: str) -> list[str]:
    """The last line of pytest's output, and a list of failed tests with their errors."""
    ends = _SUMMARY.findall(log)
    failed = [f"- `{name}` {says[:160]}".rstrip() for name, says in _FAILED.findall(log)]
    says = ends[-1] if ends else "pytest did not reach its summary"
    return [says, *(["\n".join(failed)] if failed else [])]


def _stages(stage_names: Sequence[str], outcomes: Sequence[Outcome], running: str | None) -> str:
    ended = {outcome.stage: outcome for outcome in outcomes}
    lines = []
    for name in stage_names:
        if name in ended:
            outcome = ended[name]
            last_line = outcome.last_line.replace("|", "\\|")
            lines.append([name, outcome.ended, f"{outcome.seconds:.0f}", last_line])
        else:
            lines.append([name, "running" if name == running else "not started", "", ""])
    return markdown(["stage", "ended", "seconds", "last line"], lines, left=2)
