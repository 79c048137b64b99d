"""A trainer that is killed, wherever, goes on to the end that it would have come to."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import EACH, FILES, STEPS, Run, Wishes

from reft import ReftConfig
from reft.model.checkpoint import read_adapter
from reft.train.checkpoints import UNFINISHED

#: What an adapter is on the disk.
Adapter = tuple[ReftConfig, dict[str, torch.Tensor]]

#: Moments by the clock, as shares of an undisturbed run, and in the writing of a checkpoint.
MOMENTS = [random.Random(number).random() for number in range(20)]
WRITES = 12


def keep_all(folder: Path, step: int) -> None:
    """Hard links to every checkpoint, which survive that the run removes it."""
    source = folder / f"checkpoint-{step}"
    target = folder.parent / "all" / source.name
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).hardlink_to(file)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, Any]:
    """What a run is that nobody kills, and all its checkpoints."""
    root = tmp_path_factory.mktemp("undisturbed")
    run = Run(root / "run", root / "facts")
    assert run.go(Wishes(at_save=keep_all)) == 0
    found = run.read()
    assert found["steps"] == STEPS
    assert len(found["curve"]) == STEPS + STEPS // EACH
    assert found["events"] > WRITES
    return found | {"checkpoints": root / "all", "adapter": read_adapter(run.folder / "adapter")}


def assert_same_adapter(left: Adapter, right: Adapter) -> None:
    assert left[0] == right[0]
    assert left[1].keys() == right[1].keys()
    for name, value in left[1].items():
        assert torch.equal(value, right[1][name]), name


def assert_whole(folder: Path, checkpoints: Path) -> list[int]:
    """Every checkpoint in a folder is complete and as it should be; their steps."""
    steps = []
    for checkpoint in folder.glob("checkpoint-*"):
        expected = checkpoints / checkpoint.name
        assert {file.name for file in checkpoint.iterdir()} == FILES
        assert {file.name for file in expected.iterdir()} == FILES
        assert_same_adapter(read_adapter(checkpoint), read_adapter(expected))
        for name in ("optimizer.pt", "scheduler.pt"):
            left, right = (torch.load(one / name) for one in (checkpoint, expected))
            assert str(left) == str(right)
        steps.append(int(checkpoint.name.partition("-")[2]))
    if (folder / "adapter").exists():
        read_adapter(folder / "adapter")
    return sorted(steps)


def assert_same_end(run: Run, before: list[int], expected: dict[str, Any]) -> None:
    """The last process ended the run, from the last checkpoint on and not from the beginning."""
    found = run.read()
    assert "error" not in found
    assert found["steps"] == STEPS - max(before, default=0)
    if before:
        assert found["from"].name == f"checkpoint-{max(before)}"
    else:
        assert "no whole checkpoint to resume from" in found["refusal"]
    assert found["curve"] == expected["curve"]
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        assert torch.equal(found["weights"][name], value), name
    assert_same_adapter(read_adapter(run.folder / "adapter"), expected["adapter"])
    assert not (run.folder / UNFINISHED).exists()


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda share: f"{share:.2f}")
def test_at_a_random_moment(moment, undisturbed, tmp_path):
    run = Run(tmp_path / "run", tmp_path / "facts")
    code = run.go(kill_after=moment * undisturbed["seconds"])
    assert code in (-9, 0)  # the clock of this machine may be late
    steps = assert_whole(run.folder, undisturbed["checkpoints"])
    if code:
        assert run.go() == 0
        assert_same_end(run, steps, undisturbed)


@pytest.mark.parametrize("share", [number / WRITES for number in range(WRITES)])
def test_while_it_saves(share, undisturbed, tmp_path):
    """At every so manieth file or folder that the second checkpoint makes, names or removes."""
    run = Run(tmp_path / "run", tmp_path / "facts")
    at = int(share * undisturbed["events"])
    assert run.go(Wishes(die_at=at)) == -9
    steps = assert_whole(run.folder, undisturbed["checkpoints"])
    assert steps[0] == EACH
    assert run.go() == 0
    assert_same_end(run, steps, undisturbed)


def test_behind_the_last_step(undisturbed, tmp_path):
    """No step is left; the best adapter is loaded and written all the same."""
    run = Run(tmp_path / "run", tmp_path / "facts")
    assert run.go() == 0
    shutil.rmtree(run.folder / "adapter")
    steps = assert_whole(run.folder, undisturbed["checkpoints"])
    assert steps[-1] == STEPS
    assert run.go() == 0
    assert_same_end(run, steps, undisturbed)


def test_again_and_again(undisturbed, tmp_path):
    """Progress is made as long as each process lives to its next checkpoint."""
    run = Run(tmp_path / "run", tmp_path / "facts")
    steps: list[int] = []
    for at in (5, 30, 9):
        assert run.go(Wishes(die_at=at)) in (-9, 0)
        steps = assert_whole(run.folder, undisturbed["checkpoints"])
    assert run.go() == 0
    assert_same_end(run, steps, undisturbed)
