"""The run that nobody disturbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_run import EACH, STEPS, Run, Wishes

from reft.model.checkpoint import read_adapter


def keep_all(folder: Path, step: int) -> None:
    """Hard links to every checkpoint, which survive that the run removes it."""
    source = folder / f"checkpoint-{step}"
    target = folder.parent / "all" / source.name
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).hardlink_to(file)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> dict[str, Any]:
    """What a run is that nobody kills, and all its checkpoints."""
    root = tmp_path_factory.mktemp("undisturbed")
    run = Run(root / "run", root / "facts")
    assert run.go(Wishes(at_save=keep_all)) == 0
    found = run.read()
    assert found["steps"] == STEPS
    assert len(found["curve"]) == STEPS + STEPS // EACH
    return found | {"checkpoints": root / "all", "adapter": read_adapter(run.folder / "adapter")}
