"""Assertions that an interrupted run ends like the uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small_run import FILES, STEPS, Run

from reft import ReftConfig
from reft.io.adapter_files import WEIGHTS_FILE, read_adapter
from reft.train.checkpoints import UNFINISHED

#: Files of a stored adapter.
Adapter = tuple[ReftConfig, dict[str, torch.Tensor]]


def assert_same_adapter(left: Adapter, right: Adapter) -> None:
    assert left[0] == right[0]
    assert left[1].keys() == right[1].keys()
    for name, value in left[1].items():
        assert torch.equal(value, right[1][name]), name


def assert_whole(folder: Path, checkpoints: Path) -> list[int]:
    """Check that every checkpoint in a folder is complete and correct; return their steps."""
    steps = []
    for checkpoint in folder.glob("checkpoint-*"):
        expected = checkpoints / checkpoint.name
        assert {file.name for file in checkpoint.iterdir()} == FILES
        assert {file.name for file in expected.iterdir()} == FILES
        assert_same_adapter(read_adapter(checkpoint), read_adapter(expected))
        for name in ("optimizer.pt", "scheduler.pt"):
            left, right = (torch.load(parent / name) for parent in (checkpoint, expected))
            torch.testing.assert_close(left, right, rtol=0, atol=0)
        steps.append(int(checkpoint.name.partition("-")[2]))
    if (
        folder / "adapter" / WEIGHTS_FILE
    ).exists():  # the weights are renamed last: without them there is no adapter
        read_adapter(folder / "adapter")
    return sorted(steps)


def assert_same_end(run: Run, before: list[int], expected: dict[str, Any]) -> None:
    """Check that the last process resumed from the last checkpoint and reached the same end."""
    result = run.read()
    assert "error" not in result
    assert result["steps"] == STEPS - max(before, default=0)
    if before:
        assert result["from"].name == f"checkpoint-{max(before)}"
    else:
        assert "no whole checkpoint to resume from" in result["refusal"]
    assert result["curve"] == expected["curve"]
    assert result["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        assert torch.equal(result["weights"][name], value), name
    assert_same_adapter(read_adapter(run.folder / "adapter"), expected["adapter"])
    assert not (run.folder / UNFINISHED).exists()
