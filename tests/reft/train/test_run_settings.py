"""Settings of a run in its checkpoints: a resumed run with other settings is refused."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from trainer_runs import RUN, all_equal, trainable_values

from reft.train.run_settings import FILE, _describe_data

# ------------------------------------------------------------------ refused changes

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
def test_changed_settings_are_refused_before_anything_is_restored(
    stopped_run, make_trainer, name, tmp_path
):
    checkpoint = stopped_run()
    changes, words = CHANGED[name]
    trainer = make_trainer("run", **{**RUN, **changes})
    before, files = trainable_values(trainer.model), sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match=f"belongs to another: .*{words}.*allow_changes=True"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert all_equal(before, trainable_values(trainer.model))
    assert trainer.state.global_step == 0
    assert sorted((tmp_path / "run").rglob("*")) == files


def test_changed_data_are_refused(stopped_run, make_trainer, color_records):
    checkpoint = str(stopped_run())
    changed = [*color_records[:-1], {"prompt": "e : one", "completion": "red"}]
    for data, words in (
        (color_records[:6], "the training data had 12 examples, have 6"),
        (changed, "the training data differ, with the same number"),
        (color_records[::-1], "the training data differ, with the same number"),
    ):
        trainer = make_trainer("run", data=data, **RUN)
        with pytest.raises(ValueError, match=words):
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.model.unload()


@pytest.mark.parametrize("text", ["{", "[]", '{"arguments": 3}'])
def test_damaged_settings_are_refused(stopped_run, make_trainer, text):
    checkpoint = stopped_run()
    (checkpoint / FILE).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=FILE):
        make_trainer("run", **RUN).train(resume_from_checkpoint=str(checkpoint))


# ------------------------------------------------------------------ allowed changes


def test_equal_settings_and_data_give_no_warning(stopped_run, make_trainer, color_records, caplog):
    checkpoint = stopped_run()
    trainer = make_trainer("run", data=[dict(record) for record in color_records], **RUN)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.steps_trained == 2
    assert not [record for record in caplog.records if record.name.startswith("reft")]


def test_settings_without_influence_on_training_may_change(
    stopped_run, make_trainer, color_records
):
    checkpoint = str(stopped_run())
    trainer = make_trainer(
        "run", eval_data=color_records, **{**RUN, "save_steps": 1},
        per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=2,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 4


def test_a_checkpoint_without_settings_resumes(stopped_run, make_trainer):
    """Earlier versions wrote no settings."""
    checkpoint = stopped_run()
    (checkpoint / FILE).unlink()
    trainer = make_trainer("run", **{**RUN, "learning_rate": 0.5})
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.steps_trained == 2


def test_a_longer_run_resumes_with_a_warning(stopped_run, make_trainer, caplog):
    checkpoint = str(stopped_run())
    trainer = make_trainer("run", **{**RUN, "max_steps": 6})
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 6
    assert "max_steps was 4, is 6; the learning rate follows the schedule of the" in caplog.text


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_allowed_changes_reach_the_optimizer(stopped_run, make_trainer, caplog, optim):
    """The loaded optimizer state holds the old rate and decay, which Trainer would use."""
    start = {"optim": optim, "lr_scheduler_type": "constant", "weight_decay": 0.3}
    checkpoint = str(stopped_run(**start))
    changes = {"learning_rate": 0.0, "weight_decay": 0.0}
    trainer = make_trainer("run", **{**RUN, **start, **changes})
    trainer.train(resume_from_checkpoint=checkpoint, allow_changes=True)
    assert "belongs to another run: learning_rate was 0.02, is 0.0; weight_decay" in caplog.text
    assert trainer.state.global_step == 4
    end = trainable_values(trainer.model)
    trainer.model.restore(checkpoint)
    assert all_equal(end, trainable_values(trainer.model))
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == [0.02, 0.02, 0.0, 0.0]


def test_a_changed_rate_continues_the_schedule(stopped_run, make_trainer):
    checkpoint = str(stopped_run(lr_scheduler_type="linear"))
    changes = {"lr_scheduler_type": "linear", "learning_rate": 0.2}
    trainer = make_trainer("run", **{**RUN, **changes})
    trainer.train(resume_from_checkpoint=checkpoint, allow_changes=True)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([0.02, 0.015, 0.1, 0.05])


def test_fewer_steps_than_the_checkpoint_train_none(stopped_run, make_trainer, caplog):
    checkpoint = str(stopped_run())
    trainer = make_trainer("run", **{**RUN, "max_steps": 1})
    trainer.train(resume_from_checkpoint=checkpoint, allow_changes=True)
    assert trainer.steps_trained == 0
    assert "no step was trained" in caplog.text


# ------------------------------------------------------------------ the description of the data


def test_data_are_recognised_by_their_content():
    rows = [{"input_ids": [1, 2, n], "text": f"é{n}"} for n in range(100)]
    reordered = [dict(reversed(row.items())) for row in rows]
    described = _describe_data(rows)
    assert described == _describe_data(reordered) == _describe_data(Dataset.from_list(rows))
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
    hashes = [_describe_data(data)["hash"] for data in kinds]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[1:])) == len(hashes) - 1


def test_the_hash_is_the_same_in_every_process_and_version():
    """It contains no addresses and no hashes of strings, which differ between processes."""
    row = {"a": [1, 2.5], "b": "x", "c": {"d": None}, "e": 1j, "f": True}
    assert _describe_data([row] * 3) == {"examples": 3, "hash": "87c2fd073d19b3cc26df1f694619f5dc"}


def test_random_data_and_streams_have_no_hash():
    class Random(list):
        def __getitem__(self, index):
            return {"input_ids": [random.random()]}

    assert _describe_data(Random([0] * 7)) == {"examples": 7, "hash": None}
    assert _describe_data(iter([])) == {"examples": None, "hash": None}
    assert _describe_data([])["examples"] == 0


def test_settings_are_json_in_the_checkpoint(stopped_run):
    stored = json.loads((stopped_run() / FILE).read_text(encoding="utf-8"))
    assert stored["arguments"]["learning_rate"] == 0.02
    assert stored["examples_per_step"] == 4
    assert stored["data"]["examples"] == 12
