"""Checkpoints: complete or absent, resumed from the newest complete one, the oldest removed."""

from __future__ import annotations

import os
import shutil

import pytest
from trainer_runs import RUN, all_equal, trainable_values

from reft import ReftConfig, ReftModel
from reft.train.checkpoints import (
    UNFINISHED,
    atomic_checkpoint,
    last_checkpoint,
    remove_checkpoints,
    rotate,
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
def test_a_partial_checkpoint_is_passed_over(state, tmp_path):
    checkpoint(tmp_path, 5, "{}")
    checkpoint(tmp_path, 6, state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_a_folder_without_checkpoints(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None


# ------------------------------------------------------------------ making and removing


def test_a_checkpoint_that_was_being_replaced_comes_back(tmp_path):
    """The process was killed between the two renames that replace a checkpoint."""
    (tmp_path / UNFINISHED / "replaced-checkpoint-5").mkdir(parents=True)
    (tmp_path / UNFINISHED / "replaced-checkpoint-5" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_a_checkpoint_of_the_same_number_is_replaced(tmp_path):
    checkpoint(tmp_path, 5, '"old"')
    with atomic_checkpoint(tmp_path, "checkpoint-5", writes=True, wait=lambda: None) as stage:
        checkpoint(stage, 5, '"new"')
        assert (tmp_path / "checkpoint-5" / "trainer_state.json").read_text() == '"old"'
    assert (tmp_path / "checkpoint-5" / "trainer_state.json").read_text() == '"new"'
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_errors_of_the_program_are_not_changed(tmp_path):
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
        (1, 7, [7, 4]),  # the best and the newest
        (1, 4, [4]),
        (1, 99, [4]),  # absent
        (9, None, [7, 8, 30, 4]),
    ],
)
def test_the_oldest_checkpoints_are_removed(limit, best, left, tmp_path):
    """Age decides: a new run beside an earlier one writes smaller numbers."""
    for age, step in enumerate((7, 8, 30, 4)):
        checkpoint(tmp_path, step, "{}")
        os.utime(tmp_path / f"checkpoint-{step}", (age, age))
    rotate(tmp_path, limit, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in left}


def test_all_checkpoints_are_removed_and_nothing_else(tmp_path):
    checkpoint(tmp_path, 5, None)
    checkpoint(tmp_path, 6, "{}")
    for other in ("checkpoint-best", "adapter", UNFINISHED):
        (tmp_path / other).mkdir()
    remove_checkpoints(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-best", "adapter"}


def test_a_new_run_beside_checkpoints_warns(tmp_path, make_trainer):
    (tmp_path / "run").mkdir()
    checkpoint(tmp_path / "run", 90, "{}")
    trainer = make_trainer("run", max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.warns(UserWarning, match="the last of them checkpoint-90, and training begins"):
        trainer.train()


def test_true_needs_a_complete_checkpoint(tmp_path, make_trainer):
    (tmp_path / "run").mkdir()
    checkpoint(tmp_path / "run", 3, None)
    trainer = make_trainer("run", max_steps=1)
    with pytest.raises(ValueError, match="no whole checkpoint to resume from in"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 0


# ------------------------------------------------------------------ folders that are no checkpoint


@pytest.mark.parametrize("intervention", ["loreft", "direft", "noreft"])
def test_a_published_adapter_is_no_checkpoint(make_trainer, tmp_path, intervention):
    trainer = make_trainer(config=ReftConfig(rank=2, intervention=intervention), max_steps=1)
    folder = tmp_path / "published"
    trainer.model.save_pretrained(folder)
    before = trainable_values(trainer.model)
    for path in (folder, str(folder)):
        with pytest.raises(
            ValueError, match=r"is an adapter and no checkpoint .*from_pretrained\("
        ):
            trainer.train(resume_from_checkpoint=path)
    assert all_equal(before, trainable_values(trainer.model))
    model = ReftModel.from_pretrained(trainer.model.unload(), folder, is_trainable=True)
    resumed = make_trainer(model=model, max_steps=1)
    assert intervention == "loreft" or all_equal(before, trainable_values(resumed.model))
    resumed.train()
    assert resumed.steps_trained == 1


def test_the_folder_of_a_run_is_no_checkpoint_but_holds_one(stopped_run, make_trainer, tmp_path):
    checkpoint = stopped_run()
    trainer = make_trainer("run", **RUN)
    with pytest.raises(ValueError, match=r"no checkpoint .*The last checkpoint in it is .*point-2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run"))
    trainer.save_adapter(tmp_path / "run")
    with pytest.raises(ValueError, match=r"is an adapter and no checkpoint .*checkpoint-2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="must be a folder, there is none at"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    moved = shutil.move(checkpoint, tmp_path / "elsewhere")
    trainer.train(resume_from_checkpoint=moved)
    assert trainer.steps_trained == 2
