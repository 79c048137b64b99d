"""ReftTrainer: learning, evaluating, resuming bit for bit, what Trainer asks of a model."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    TrainerCallback,
)

from reft.config import ReftConfig
from reft.io.adapter_files import read_adapter
from reft.model.reft_model import ReftModel
from reft.train.collate import ReftDataCollator
from reft.train.trainer import ReftTrainer


def losses(trainer: ReftTrainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def trainable(model: ReftModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


# ------------------------------------------------------------------ learning


@pytest.mark.parametrize("intervention", ["loreft", "direft"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_loss_goes_down_and_the_base_stays(
    make_trainer, word_llama, intervention, weight_decay
):
    config = ReftConfig(intervention=intervention, rank=4, positions="f2+l2")
    before = {name: value.clone() for name, value in word_llama.state_dict().items()}
    trainer = make_trainer(config=config, weight_decay=weight_decay, max_steps=40)
    trainer.train()
    found = losses(trainer)
    assert found[0] > 0.4  # half of ln 3: one of three colours, and an end that the base knows
    assert sum(found[-3:]) / 3 < 0.25 * found[0]
    assert trainer.model.orthonormality_error() < 1e-5
    assert same(before, trainer.model.unload().state_dict())


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


def test_one_step_is_the_gradient_step_of_the_plain_loop(
    make_trainer, word_llama, word_tokenizer, color_records
):
    trainer = make_trainer(
        config=ReftConfig(rank=2),
        data=color_records[:4],
        max_steps=1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    model = trainer.model
    start = trainable(model)
    batch = ReftDataCollator(word_tokenizer)(color_records[:4])
    model.train()
    model(**batch).loss.backward()
    expected = {
        name: value - 2e-2 * dict(model.named_parameters())[name].grad
        for name, value in start.items()
    }
    model.zero_grad()
    trainer.train()
    after = trainable(model)
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-6)
    assert not same(start, after)


def test_gradient_accumulation_is_one_large_batch(make_trainer, color_records):
    # Completions of different lengths: a mean of means would be another loss.
    data = [*color_records[:3], {"prompt": "a", "completion": "red green blue yes no"}]
    results = []
    for size, accumulate in ((4, 1), (1, 4)):
        trainer = make_trainer(
            config=ReftConfig(rank=2),
            data=data,
            max_steps=1,
            optim="sgd",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
        )
        trainer.train()
        results.append((losses(trainer)[0], trainable(trainer.model)))
        trainer.model.unload()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ disk


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(make_trainer, tmp_path):
    whole = make_trainer("whole", max_steps=6, weight_decay=0.01)
    whole.train()
    expected, logged = trainable(whole.model), losses(whole)
    whole.model.unload()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    first = make_trainer(
        "split", max_steps=6, weight_decay=0.01, save_strategy="steps", save_steps=3
    )
    first.add_callback(Stop)
    first.train()
    stopped = trainable(first.model)
    assert not same(stopped, expected)
    first.model.unload()
    checkpoint = tmp_path / "split" / "checkpoint-3"

    second = make_trainer("split", max_steps=6, weight_decay=0.01)
    assert not same(trainable(second.model), stopped)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert same(trainable(second.model), expected)
    assert losses(second) == logged


def test_a_checkpoint_holds_the_adapter_and_no_base(
    make_trainer, tmp_path, word_llama, color_records
):
    trainer = make_trainer(save_strategy="steps", save_steps=6)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-6"
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


def test_the_best_model_comes_back_at_the_end(make_trainer, color_records):
    trainer = make_trainer(
        max_steps=8,
        eval_data=color_records,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        learning_rate=0.3,  # far too much: the best step is not the last
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


# ------------------------------------------------------------------ evaluating


def test_evaluate_is_the_loss_of_the_model(make_trainer, word_tokenizer, color_records):
    trainer = make_trainer(eval_data=color_records, per_device_eval_batch_size=12)
    metrics = trainer.evaluate()
    batch = ReftDataCollator(word_tokenizer)(color_records)
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).loss
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_metrics_see_logits_and_labels(make_trainer, word_tokenizer, color_records):
    seen = {}

    def compute_metrics(prediction):
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        labels = prediction.label_ids[:, 1:]
        right = prediction.predictions.argmax(-1)[:, :-1] == labels
        return {"accuracy": float(right[labels != -100].mean())}

    trainer = make_trainer(eval_data=color_records)
    trainer.compute_metrics = compute_metrics
    assert 0.0 <= trainer.evaluate()["eval_accuracy"] < 0.7
    assert seen["shapes"] == ((12, 6, len(word_tokenizer)), (12, 6))
    trainer.args.max_steps = 60
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.7
    predicted = trainer.predict(color_records[:2])
    assert predicted.predictions.shape == (2, 6, len(word_tokenizer))


def test_label_smoothing_and_own_losses_still_edit_the_prompt(
    make_trainer, word_tokenizer, color_records
):
    # Both keep the labels from the model, which would otherwise take the answer for prompt too.
    batch = dict(ReftDataCollator(word_tokenizer)(color_records[:4]))
    trainer = make_trainer(config=ReftConfig(rank=2, positions="l1"), label_smoothing_factor=0.1)
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(**batch).logits
        smoothed = trainer.compute_loss(model, dict(batch))
    scores = logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    nll = -scores.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)[counted].mean()
    uniform = -scores.mean(-1)[counted].mean()
    torch.testing.assert_close(smoothed, 0.9 * nll + 0.1 * uniform)

    trainer.label_smoother, seen = None, {}

    def own(outputs, labels, num_items_in_batch=None):
        seen["logits"] = outputs.logits
        return outputs.logits.sum()

    trainer.compute_loss_func = own
    with torch.no_grad():
        trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(seen["logits"], logits)
