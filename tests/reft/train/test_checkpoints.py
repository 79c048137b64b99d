"""Checkpoints: whole or not there, the newest whole one is gone on from, the oldest are removed."""

from __future__ import annotations

import os

import pytest
import torch

from reft.train.checkpoints import (
    UNFINISHED,
    last_checkpoint,
    remove_checkpoints,
    rotate,
    atomic_checkpoint,
)


def checkpoint(folder, step: int, state: str | None) -> None:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if state is not None:
        (path / "trainer_state.json").write_text(state, encoding="utf-8")


def test_the_newest_by_number(tmp_path):
    for step in (9, 100, 20):
        checkpoint(tmp_path, step, "{}")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("state", [None, "", '{"global_step": 3'])
def test_half_a_checkpoint_is_passed_over(state, tmp_path):
    checkpoint(tmp_path, 5, "{}")
    checkpoint(tmp_path, 6, state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_none(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None


# ------------------------------------------------------------------ making and removing


def test_a_checkpoint_that_was_being_replaced_comes_back(tmp_path):
    """A kill came between taking the old one's name and giving it to the new one."""
    (tmp_path / UNFINISHED / "replaced-checkpoint-5").mkdir(parents=True)
    (tmp_path / UNFINISHED / "replaced-checkpoint-5" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_one_of_the_same_number_is_replaced(tmp_path):
    checkpoint(tmp_path, 5, '"old"')
    with atomic_checkpoint(tmp_path, "checkpoint-5", writes=True, wait=lambda: None) as stage:
        checkpoint(stage, 5, '"new"')
        assert (tmp_path / "checkpoint-5" / "trainer_state.json").read_text() == '"old"'
    assert (tmp_path / "checkpoint-5" / "trainer_state.json").read_text() == '"new"'
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_an_error_of_the_program_stays_what_it_is(tmp_path):
    with (
        pytest.raises(RuntimeError, match="a defect"),
        atomic_checkpoint(tmp_path, "checkpoint-5", writes=True, wait=lambda: None),
    ):
        raise RuntimeError("a defect")
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [7, 8, 30, 4]),
        (0, None, [7, 8, 30, 4]),
        (2, None, [30, 4]),
        (2, 7, [7, 4]),
        (1, 7, [7, 4]),  # the best one and the newest
        (1, 4, [4]),
        (1, 99, [4]),  # not there
        (9, None, [7, 8, 30, 4]),
    ],
)
def test_the_oldest_are_removed(limit, best, left, tmp_path):
    """By time, since a run that was begun anew writes smaller numbers beside another's."""
    for age, step in enumerate((7, 8, 30, 4)):
        checkpoint(tmp_path, step, "{}")
        os.utime(tmp_path / f"checkpoint-{step}", (age, age))
    rotate(tmp_path, limit, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{one}" for one in left}


def test_all_are_removed_and_nothing_else(tmp_path):
    checkpoint(tmp_path, 5, None)
    checkpoint(tmp_path, 6, "{}")
    for other in ("checkpoint-best", "adapter", UNFINISHED):
        (tmp_path / other).mkdir()
    remove_checkpoints(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-best", "adapter"}


def test_a_run_that_begins_anew_beside_checkpoints_warns(tmp_path, make_trainer):
    (tmp_path / "run").mkdir()
    checkpoint(tmp_path / "run", 90, "{}")
    trainer = make_trainer("run", max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.warns(UserWarning, match="the last of them checkpoint-90, and training begins"):
        trainer.train()


def test_true_asks_for_a_whole_checkpoint(tmp_path, make_trainer):
    (tmp_path / "run").mkdir()
    checkpoint(tmp_path / "run", 3, None)
    trainer = make_trainer("run", max_steps=1)
    with pytest.raises(ValueError, match="no whole checkpoint to resume from in"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 0


def test_a_run_that_is_over_takes_no_step(tmp_path, make_trainer):
    """In the middle of a pass, where transformers' Trainer looks behind the next step only."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer = make_trainer("run", **settings)
    trainer.train()
    end = {name: one.clone() for name, one in trainer.model.state_dict().items()}
    trainer.model.unload()
    again = make_trainer("run", **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    found = again.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in end.items())
