"""AdapterTrainer: weight decay, checkpoints without the base, resuming bit for bit."""

from __future__ import annotations

import pytest
import torch
from trainer_runs import RUN, StopAt, all_equal, losses, trainable_values
from transformers import TrainerCallback

from reft.config import ReftConfig
from reft.io.adapter_files import read_adapter
from reft.model.reft_model import ReftModel, get_reft_model
from reft.train.collate import ReftDataCollator


def test_weight_decay_acts_on_matrices_and_not_on_biases_or_rotations(make_trainer):
    decayed = {}
    for intervention in ("loreft", "direft"):
        trainer = make_trainer(
            config=ReftConfig(intervention=intervention, rank=2), weight_decay=0.1
        )
        names = {id(p): n.rpartition(".")[2] for n, p in trainer.model.named_parameters()}
        optimizer = trainer.create_optimizer()
        decayed[intervention] = [
            (group["weight_decay"], sorted(names[id(p)] for p in group["params"]))
            for group in optimizer.param_groups
        ]
        trainer.model.unload()
    assert decayed == {
        "loreft": [(0.1, ["weight"]), (0.0, ["bias", "free"])],
        "direft": [(0.1, ["decode", "weight"]), (0.0, ["bias"])],
    }


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(make_trainer, tmp_path):
    """With dropout, weight decay and a shuffled order of the data."""
    settings = {**RUN, "weight_decay": 0.01}
    uninterrupted = make_trainer("uninterrupted", **{**settings, "save_strategy": "no"})
    uninterrupted.train()
    expected, logged = trainable_values(uninterrupted.model), losses(uninterrupted)
    uninterrupted.model.unload()

    first = make_trainer("split", **settings)
    first.add_callback(StopAt(2))
    first.train()
    stopped = trainable_values(first.model)
    assert not all_equal(stopped, expected)
    first.model.unload()

    second = make_trainer("split", **settings)
    assert not all_equal(trainable_values(second.model), stopped)
    second.train(resume_from_checkpoint=str(tmp_path / "split" / "checkpoint-2"))
    assert all_equal(trainable_values(second.model), expected)
    assert losses(second) == logged


def test_resuming_a_finished_run_trains_no_step(make_trainer, caplog):
    """Trainer checks the number of steps only after a step, here in the middle of an epoch."""
    first = make_trainer("run", **RUN)
    first.train()
    assert first.steps_trained == 4
    assert "no step" not in caplog.text
    end = {name: value.clone() for name, value in first.model.state_dict().items()}
    first.model.unload()
    resumed = make_trainer("run", **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert resumed.steps_trained == 0
    assert "has all 4 steps of this run already; increase" in caplog.text
    assert all_equal(resumed.model.state_dict(), end)


def test_a_checkpoint_holds_the_adapter_and_no_base(
    make_trainer, tmp_path, word_llama, color_records
):
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-2"
    names = {entry.name for entry in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= names
    assert {"scheduler.pt", "trainer_state.json", "training_args.bin", "tokenizer.json"} <= names
    assert not {"model.safetensors", "pytorch_model.bin", "config.json"} & names
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in word_llama.model.embed_tokens.parameters()) * 8
    _, tensors = read_adapter(folder)
    assert not [name for name in tensors if "lm_head" in name or "embed" in name]
    assert any("free" in name for name in tensors)

    trainer.save_model(str(tmp_path / "published"))
    config, published = read_adapter(tmp_path / "published")
    assert config == trainer.model.configs["default"]
    assert not any("free" in name for name in published)
    batch = ReftDataCollator(trainer.processing_class)(color_records)
    expected = trainer.model.eval()(**batch).logits
    loaded = ReftModel.from_pretrained(trainer.model.unload(), tmp_path / "published")
    torch.testing.assert_close(loaded.eval()(**batch).logits, expected, rtol=1e-5, atol=1e-6)


def test_the_best_model_is_loaded_at_the_end(make_trainer, color_records):
    trainer = make_trainer(
        max_steps=8,
        eval_data=color_records,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        learning_rate=0.3,  # far too large: the best step is not the last
        lr_scheduler_type="constant",
    )
    trainer.train()
    evaluated = {
        row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row
    }
    best = min(evaluated, key=evaluated.__getitem__)
    assert best != 8
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == evaluated[best]


# ------------------------------------------------------------------ missing optimizer state


@pytest.mark.parametrize("missing", [["optimizer.pt"], ["scheduler.pt"], ["rng_state.pth"], None])
def test_state_that_a_checkpoint_lacks_begins_anew(stopped_run, make_trainer, caplog, missing):
    checkpoint = stopped_run(save_only_model=missing is None)
    for name in missing or ():
        (checkpoint / name).unlink()
    trainer = make_trainer("run", **RUN)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 4
    messages = [record.getMessage() for record in caplog.records]
    warnings = [message for message in messages if "begins anew" in message]
    lacking = ["optimizer.pt", "scheduler.pt"] if missing is None else missing
    assert len(warnings) == (0 if lacking == ["rng_state.pth"] else 1)
    assert all(f"no {name}" in warning for warning in warnings for name in lacking)


def test_a_new_optimizer_continues_from_the_stored_adapter(stopped_run, make_trainer, word_llama):
    """The step after the checkpoint begins with the checkpoint's weights."""
    start = {"optim": "sgd", "lr_scheduler_type": "constant", "save_only_model": True}
    config = ReftConfig(rank=2, positions="f2+l2")
    checkpoint = str(stopped_run(config=config, **start))
    key = "base_model.reft.adapters.default.weight"
    stored = ReftModel.from_pretrained(word_llama, checkpoint)
    weight = stored.state_dict()[key].clone()
    model = get_reft_model(stored.unload(), config)
    trainer = make_trainer("run", model=model, **{**RUN, **start, "max_steps": 3})
    seen = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.setdefault(state.global_step, model.state_dict()[key].clone())

    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=checkpoint)
    torch.testing.assert_close(seen[2], weight)
    assert list(seen) == [2]
