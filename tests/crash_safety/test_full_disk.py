"""A full or read-only disk raises a clear error, leaves no partial checkpoint, and the run resumes
to the same end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from same_end import assert_same_adapter, assert_same_end, assert_whole
from small_run import EACH, Run, Wishes
from tiny_models import llama

from reft import ReftConfig, get_reft_model
from reft.io.adapter_files import read_adapter
from reft.train.checkpoints import UNFINISHED

#: Bytes of the file system, and of its blocks.
SIZE, BLOCK = 1 << 20, 4096


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def remount(place: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(place)], check=True)


def fill(place: Path, left: int) -> None:
    """Fill the disk but for this number of bytes."""
    free = os.statvfs(place)
    with (place / "filler").open("wb") as file:
        file.write(b"x" * (free.f_bavail * free.f_frsize - left))


def fill_at(step: int, place: Path, left: int, run: Path, now: int) -> None:
    if now == step:
        fill(place, left)


def read_only_at(step: int, place: Path, run: Path, now: int) -> None:
    if now == step:
        remount(place, "ro")


@pytest.mark.parametrize("left", [0, 2, 5, 10])
def test_full(left, disk, undisturbed, tmp_path):
    """The disk has room for this number of blocks of the checkpoint that follows step 4."""
    run = Run(disk / "run", tmp_path / "facts")
    assert run.go(Wishes(at_save=partial(fill_at, 2 * EACH, disk, left * BLOCK))) == 0
    said = run.read()["error"]
    assert f"checkpoint-{3 * EACH} could not be written (No space left on device)" in said
    assert "training can be resumed" in said
    assert not (run.folder / UNFINISHED).exists()
    steps = assert_whole(run.folder, undisturbed["checkpoints"])
    assert steps == [EACH, 2 * EACH]
    (disk / "filler").unlink()
    assert run.go() == 0
    assert_same_end(run, steps, undisturbed)


@pytest.mark.parametrize("left", [0, 1])
def test_full_when_the_adapter_is_published(left, disk, tmp_path):
    """The folder holds the old adapter, or the new one if its weights did fit."""
    model = get_reft_model(llama(), ReftConfig(rank=2))
    model.save_pretrained(disk / "adapter")
    old = read_adapter(disk / "adapter")
    names = {file.name for file in (disk / "adapter").iterdir()}
    with torch.no_grad():
        for parameter in model.reft.parameters():
            parameter.add_(1.0)
    model.save_pretrained(tmp_path / "new")
    fill(disk, left * BLOCK)
    with pytest.raises(OSError, match="No space left on device"):
        model.save_pretrained(disk / "adapter")
    assert_same_adapter(
        read_adapter(disk / "adapter"), read_adapter(tmp_path / "new") if left else old
    )
    assert {file.name for file in (disk / "adapter").iterdir()} == names


def test_read_only_from_some_step_on(disk, undisturbed, tmp_path):
    run = Run(disk / "run", tmp_path / "facts")
    assert run.go(Wishes(at_save=partial(read_only_at, 2 * EACH, disk))) == 0
    said = run.read()["error"]
    assert f"checkpoint-{3 * EACH} could not be written (Read-only file system)" in said
    steps = assert_whole(run.folder, undisturbed["checkpoints"])
    assert steps == [EACH, 2 * EACH]
    remount(disk, "rw")
    assert run.go() == 0
    assert_same_end(run, steps, undisturbed)


def test_read_only_from_the_beginning(disk, undisturbed, tmp_path):
    """The error comes before the first step."""
    run = Run(disk / "run", tmp_path / "facts")
    run.folder.mkdir()
    remount(disk, "ro")
    assert run.go() == 0
    result = run.read()
    assert result["error"].startswith("[Errno 30] checkpoints cannot be written (Read-only")
    assert result["steps"] == 0
    remount(disk, "rw")
    assert run.go() == 0
    assert_same_end(run, [], undisturbed)
