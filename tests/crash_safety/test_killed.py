"""A training run that is killed at any moment resumes to the same end."""

from __future__ import annotations

import random
import shutil

import pytest
from same_end import assert_same_end, assert_whole
from small_run import EACH, STEPS, Run, Wishes

#: Random moments, as fractions of an uninterrupted run, and number of file events to kill at.
MOMENTS = [random.Random(number).random() for number in range(10)]
WRITES = 8


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda share: f"{share:.2f}")
def test_at_a_random_moment(moment, undisturbed, tmp_path):
    run = Run(tmp_path / "run", tmp_path / "facts")
    code = run.go(kill_after=moment * undisturbed["seconds"])
    assert code in (-9, 0)  # on a busy machine the run may end before the kill
    steps = assert_whole(run.folder, undisturbed["checkpoints"])
    if code:
        assert run.go() == 0
        assert_same_end(run, steps, undisturbed)


@pytest.mark.parametrize("share", [number / WRITES for number in range(WRITES)])
def test_while_it_saves(share, undisturbed, tmp_path):
    """Kill the process at evenly spaced file events while it writes the second checkpoint."""
    run = Run(tmp_path / "run", tmp_path / "facts")
    assert undisturbed["events"] > WRITES
    at = int(share * undisturbed["events"])
    assert run.go(Wishes(die_at=at)) == -9
    steps = assert_whole(run.folder, undisturbed["checkpoints"])
    assert steps[0] == EACH
    assert run.go() == 0
    assert_same_end(run, steps, undisturbed)


def test_behind_the_last_step(undisturbed, tmp_path):
    """Resuming performs no further step, but loads and writes the best adapter."""
    run = Run(tmp_path / "run", tmp_path / "facts")
    assert run.go() == 0
    shutil.rmtree(run.folder / "adapter")
    steps = assert_whole(run.folder, undisturbed["checkpoints"])
    assert steps[-1] == STEPS
    assert run.go() == 0
    assert_same_end(run, steps, undisturbed)


def test_again_and_again(undisturbed, tmp_path):
    """The run advances if each process reaches its next checkpoint."""
    run = Run(tmp_path / "run", tmp_path / "facts")
    steps: list[int] = []
    for at in (5, 30, 9):
        assert run.go(Wishes(die_at=at)) in (-9, 0)
        steps = assert_whole(run.folder, undisturbed["checkpoints"])
    assert run.go() == 0
    assert_same_end(run, steps, undisturbed)
