"""The uninterrupted run that interrupted runs are compared with."""

from __future__ import annotations

from typing import Any

import pytest
from small_run import EACH, STEPS, Run, Wishes, keep_all

from reft.io.adapter_files import read_adapter


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> dict[str, Any]:
    """Results of an uninterrupted run, and all its checkpoints."""
    root = tmp_path_factory.mktemp("undisturbed")
    run = Run(root / "run", root / "facts")
    assert run.go(Wishes(at_save=keep_all)) == 0
    result = run.read()
    assert result["steps"] == STEPS
    assert len(result["curve"]) == STEPS + STEPS // EACH
    return result | {"checkpoints": root / "all", "adapter": read_adapter(run.folder / "adapter")}
