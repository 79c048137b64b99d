"""ReftTrainer: the loss decreases, steps and metrics are those of the plain training loop."""

from __future__ import annotations

import pytest
import torch
from trainer_runs import all_equal, losses, trainable_values

from reft.config import ReftConfig
from reft.train.collate import ReftDataCollator

# ------------------------------------------------------------------ learning


@pytest.mark.parametrize(("intervention", "weight_decay"), [("loreft", 0.1), ("direft", 0.0)])
def test_the_loss_goes_down_and_the_base_stays(
    make_trainer, word_llama, intervention, weight_decay
):
    config = ReftConfig(intervention=intervention, rank=4, positions="f2+l2")
    before = {name: value.clone() for name, value in word_llama.state_dict().items()}
    trainer = make_trainer(config=config, weight_decay=weight_decay, max_steps=40)
    trainer.train()
    logged = losses(trainer)
    assert logged[0] > 0.4  # half of ln 3: one of three colours, and an end that the base knows
    assert sum(logged[-3:]) / 3 < 0.25 * logged[0]
    assert trainer.model.orthonormality_error() < 1e-5
    assert all_equal(before, trainer.model.unload().state_dict())


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
    start = trainable_values(model)
    batch = ReftDataCollator(word_tokenizer)(color_records[:4])
    model.train()
    model(**batch).loss.backward()
    expected = {
        name: value - 2e-2 * dict(model.named_parameters())[name].grad
        for name, value in start.items()
    }
    model.zero_grad()
    trainer.train()
    after = trainable_values(model)
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-6)
    assert not all_equal(start, after)


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
        results.append((losses(trainer)[0], trainable_values(trainer.model)))
        trainer.model.unload()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-4, atol=1e-6)


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
    trainer.args.max_steps = 40
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.7
    predicted = trainer.predict(color_records[:2])
    assert predicted.predictions.shape == (2, 6, len(word_tokenizer))


def test_label_smoothing_and_custom_losses_still_edit_the_prompt(
    make_trainer, word_tokenizer, color_records
):
    # Both withhold the labels from the model, which would then count the answer to the prompt.
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

    def custom_loss(outputs, labels, num_items_in_batch=None):
        seen["logits"] = outputs.logits
        return outputs.logits.sum()

    trainer.compute_loss_func = custom_loss
    with torch.no_grad():
        trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(seen["logits"], logits)
