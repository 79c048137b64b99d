"""Going on from a checkpoint with another run than the one that wrote it: said, or refused."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from reft import ReftConfig, ReftModel, get_reft_model
from reft.train import run_settings
from reft.train.run_settings import FILE, _describe_data


class Stop(TrainerCallback):
    """Ends a run behind a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


SETTINGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def values(model: ReftModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(left, right) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def begun(make_trainer, tmp_path):
    """A function that trains two of four steps, and the path of their checkpoint."""

    def train(**changes):
        trainer = make_trainer("run", **{**SETTINGS, **changes})
        trainer.add_callback(Stop(2))
        trainer.train()
        trainer.model.unload()
        return str(tmp_path / "run" / "checkpoint-2")

    return train


def forget(checkpoint: str) -> None:
    """As a checkpoint of an earlier version is."""
    (run_settings.Path(checkpoint) / FILE).unlink()


# ------------------------------------------------------------------ what is refused

CHANGED = {
    "rate": ({"learning_rate": 0.5}, "learning_rate was 0.02, is 0.5"),
    "schedule": ({"lr_scheduler_type": "linear"}, "lr_scheduler_type was 'cosine', is 'linear'"),
    "warmup": ({"warmup_steps": 2}, "warmup_steps was 0, is 2"),
    "decay": ({"weight_decay": 0.1}, r"weight_decay was 0\.0, is 0\.1"),
    "seed": ({"seed": 4}, "seed was 3, is 4"),
    "batch": ({"per_device_train_batch_size": 2}, r"examples per step .* were 4, are 2"),
    "accumulation": ({"gradient_accumulation_steps": 2}, r"examples per step .* were 4, are 8"),
    "optimizer": ({"optim": "sgd"}, "optim was 'adamw_torch.*', is 'sgd'"),
    "several": (
        {"learning_rate": 0.5, "seed": 4}, "learning_rate was 0.02, is 0.5; seed was 3, is 4"),
    "steps": ({"max_steps": 1}, "the checkpoint has 2 steps, max_steps is 1"),
    "epochs": (
        {"max_steps": -1, "num_train_epochs": 0.25},
        r"the checkpoint has 0\.667 epochs, num_train_epochs is 0\.25"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_another_run_is_refused_and_nothing_was_restored(begun, make_trainer, name, tmp_path):
    checkpoint = begun()
    changes, words = CHANGED[name]
    trainer = make_trainer("run", **{**SETTINGS, **changes})
    before, files = values(trainer.model), sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match=f"of another: .*{words}.*allow_changes=True"):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert same(before, values(trainer.model))
    assert trainer.state.global_step == 0
    assert sorted((tmp_path / "run").rglob("*")) == files


def test_other_data_are_refused(begun, make_trainer, color_records):
    checkpoint = begun()
    other = [*color_records[:-1], {"prompt": "e : one", "completion": "red"}]
    for data, words in (
        (color_records[:6], "the training data had 12 examples, have 6"),
        (other, "the training data are others, of the same number"),
        (color_records[::-1], "the training data are others, of the same number"),
    ):
        trainer = make_trainer("run", data=data, **SETTINGS)
        with pytest.raises(ValueError, match=words):
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.model.unload()
    trainer = make_trainer("run", data=[dict(one) for one in color_records], **SETTINGS)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.steps_trained == 2


def test_what_determines_nothing_may_change(begun, make_trainer, color_records):
    checkpoint = begun()
    trainer = make_trainer(
        "run", eval_data=color_records, **{**SETTINGS, "save_steps": 1},
        per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=2,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 4


def test_a_checkpoint_without_settings_is_gone_on_from(begun, make_trainer):
    checkpoint = begun()
    forget(checkpoint)
    trainer = make_trainer("run", **{**SETTINGS, "learning_rate": 0.5})
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.steps_trained == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"arguments": 3}'])
def test_damaged_settings_are_refused(begun, make_trainer, text):
    checkpoint = begun()
    (run_settings.Path(checkpoint) / FILE).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=FILE):
        make_trainer("run", **SETTINGS).train(resume_from_checkpoint=checkpoint)


# ------------------------------------------------------------------ what is allowed


def test_a_longer_run_goes_on_and_says_so(begun, make_trainer, caplog):
    checkpoint = begun()
    trainer = make_trainer("run", **{**SETTINGS, "max_steps": 6})
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 6
    assert "max_steps was 4, is 6; the learning rate follows the schedule of the" in caplog.text


def test_the_same_run_goes_on_and_says_nothing(begun, make_trainer, caplog):
    checkpoint = begun()
    trainer = make_trainer("run", **SETTINGS)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.steps_trained == 2
    assert not [one for one in caplog.records if one.name.startswith("reft")]


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_a_change_that_is_allowed_acts(begun, make_trainer, caplog, optim):
    """The stored optimizer holds the old rate and decay; transformers' Trainer goes on with it."""
    start = {"optim": optim, "lr_scheduler_type": "constant", "weight_decay": 0.3}
    checkpoint = begun(**start)
    changes = {"learning_rate": 0.0, "weight_decay": 0.0}
    trainer = make_trainer("run", **{**SETTINGS, **start, **changes})
    trainer.train(resume_from_checkpoint=checkpoint, allow_changes=True)
    assert "is of another run: learning_rate was 0.02, is 0.0; weight_decay" in caplog.text
    assert trainer.state.global_step == 4
    ended = values(trainer.model)
    trainer.model.restore(checkpoint)
    assert same(ended, values(trainer.model))
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == [0.02, 0.02, 0.0, 0.0]


def test_a_changed_rate_goes_on_where_the_schedule_is(begun, make_trainer):
    checkpoint = begun(lr_scheduler_type="linear")
    trainer = make_trainer(
        "run", **{**SETTINGS, "lr_scheduler_type": "linear", "learning_rate": 0.2}
    )
    trainer.train(resume_from_checkpoint=checkpoint, allow_changes=True)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([0.02, 0.015, 0.1, 0.05])


def test_fewer_steps_that_are_allowed_take_none(begun, make_trainer, caplog):
    checkpoint = begun()
    trainer = make_trainer("run", **{**SETTINGS, "max_steps": 1})
    trainer.train(resume_from_checkpoint=checkpoint, allow_changes=True)
    assert trainer.steps_trained == 0
    assert "no step was trained" in caplog.text


def test_a_run_that_is_over_says_that_it_trains_no_step(make_trainer, caplog):
    make = lambda: make_trainer("run", **{**SETTINGS, "max_steps": 2})  # noqa: E731
    first = make()
    first.train()
    assert first.steps_trained == 2
    assert "no step" not in caplog.text
    first.model.unload()
    again = make()
    again.train(resume_from_checkpoint=True)
    assert again.steps_trained == 0
    assert "has all 2 steps of this run already; give it more" in caplog.text


# ------------------------------------------------------------------ what the data are


def test_data_are_known_by_their_content():
    rows = [{"input_ids": [1, 2, n], "text": f"é{n}"} for n in range(100)]
    shuffled = [dict(reversed(row.items())) for row in rows]
    assert _describe_data(rows) == _describe_data(shuffled) == _describe_data(Dataset.from_list(rows))
    kinds = [
        [{"input_ids": torch.tensor([1, 2, n])} for n in range(100)],
        [{"input_ids": np.array([1, 2, n])} for n in range(100)],
        [{"input_ids": [1, 2, n]} for n in range(100)],
        [{"input_ids": [1, 2, n + 1]} for n in range(100)],
        [{"input_ids": [12, n]} for n in range(100)],
        [{"input_ids": [1, [2, n]]} for n in range(100)],
        [{"labels": [1, 2, n]} for n in range(100)],
        [{"input_ids": b"a"}] * 100, [{"input_ids": "a"}] * 100, [{"input_ids": None}] * 100,
        [{"input_ids": torch.tensor([1.5], dtype=torch.bfloat16)}] * 100,
    ]  # fmt: skip
    found = [_describe_data(one)["hash"] for one in kinds]
    assert found[0] == found[1]
    assert len(set(found[1:])) == len(found) - 1


def test_data_are_the_same_in_every_process_and_version():
    """No addresses, no hashes of strings, which differ between processes."""

    row = {"a": [1, 2.5], "b": "x", "c": {"d": None}, "e": 1j, "f": True}
    assert _describe_data([row] * 3) == {"examples": 3, "hash": "87c2fd073d19b3cc26df1f694619f5dc"}


def test_data_that_are_drawn_anew_each_time_are_counted_alone():
    class Drawn(list):
        def __getitem__(self, place):
            return {"input_ids": [random.random()]}

    assert _describe_data(Drawn([0] * 7)) == {"examples": 7, "hash": None}
    assert _describe_data(iter([])) == {"examples": None, "hash": None}
    assert _describe_data([])["examples"] == 0


def test_settings_lie_in_the_checkpoint_as_text(begun):
    stored = json.loads((run_settings.Path(begun()) / FILE).read_text(encoding="utf-8"))
    assert stored["arguments"]["learning_rate"] == 0.02
    assert stored["examples_per_step"] == 4
    assert stored["data"]["examples"] == 12


# ------------------------------------------------------------------ without an optimizer


@pytest.mark.parametrize("missing", [["optimizer.pt"], ["scheduler.pt"], ["rng_state.pth"], None])
def test_what_a_checkpoint_has_not_begins_anew(begun, make_trainer, caplog, missing):
    checkpoint = begun(save_only_model=missing is None)
    folder = run_settings.Path(checkpoint)
    for name in missing or ():
        (folder / name).unlink()
    trainer = make_trainer("run", **SETTINGS)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 4
    said = [one.getMessage() for one in caplog.records if "begins anew" in one.getMessage()]
    gone = ["optimizer.pt", "scheduler.pt"] if missing is None else missing
    assert len(said) == (0 if gone == ["rng_state.pth"] else 1)
    assert all(f"no {name}" in one for one in said for name in gone)


def test_a_new_optimizer_goes_on_from_the_stored_adapter(begun, make_trainer):
    """One step of plain gradient descent from the checkpoint's adapter."""
    start = {"optim": "sgd", "lr_scheduler_type": "constant", "save_only_model": True}
    config = ReftConfig(rank=2, positions="f2+l2")
    checkpoint = begun(config=config, **start)
    trainer = make_trainer("run", config=config, **{**SETTINGS, **start, "max_steps": 3})
    stored = ReftModel.from_pretrained(trainer.model.unload(), checkpoint)
    weight = stored.state_dict()["base_model.reft.adapters.default.weight"].clone()
    base = stored.unload()
    model = get_reft_model(base, config)
    trainer = make_trainer("run", model=model, **{**SETTINGS, **start, "max_steps": 3})
    seen = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            found = model.state_dict()["base_model.reft.adapters.default.weight"]
            seen.setdefault(state.global_step, found.clone())

    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=checkpoint)
    torch.testing.assert_close(seen[2], weight)
    assert list(seen) == [2]


# ------------------------------------------------------------------ what is no checkpoint


@pytest.mark.parametrize("intervention", ["loreft", "direft", "noreft"])
def test_a_published_adapter_is_no_checkpoint(make_trainer, tmp_path, intervention):
    trainer = make_trainer(config=ReftConfig(rank=2, intervention=intervention), max_steps=1)
    folder = tmp_path / "published"
    trainer.model.save_pretrained(folder)
    before = values(trainer.model)
    for path in (folder, str(folder)):
        with pytest.raises(
            ValueError, match=r"is an adapter and no checkpoint .*from_pretrained\("
        ):
            trainer.train(resume_from_checkpoint=path)
    assert same(before, values(trainer.model))
    model = ReftModel.from_pretrained(trainer.model.unload(), folder, is_trainable=True)
    again = make_trainer(model=model, max_steps=1)
    assert same(before, values(again.model)) or intervention == "loreft"
    again.train()
    assert again.steps_trained == 1


def test_the_folder_of_a_run_is_no_checkpoint_but_holds_one(begun, make_trainer, tmp_path):
    checkpoint = begun()
    trainer = make_trainer("run", **SETTINGS)
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
