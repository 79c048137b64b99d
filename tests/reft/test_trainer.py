"""ReftTrainer: learning, evaluating, resuming bit for bit, what Trainer asks of a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from reft.config import ReftConfig
from reft.model.checkpoint import read_adapter
from reft.model.reft_model import ReftModel, get_reft_model
from reft.train.collate import ReftDataCollator
from reft.train.trainer import ReftTrainer

COLORS = {"one": "red", "two": "green", "three": "blue"}
RECORDS = [
    {"prompt": f"{letter} : {number}", "completion": color}
    for letter in "abcd"
    for number, color in COLORS.items()
]


@pytest.fixture
def make(word_llama, word_tokenizer, tmp_path):
    """A trainer of a fresh adapter; keyword arguments go to TrainingArguments."""

    def build(
        folder: str = "run", *, model=None, config=None, data=RECORDS, eval_data=None, **arguments
    ) -> ReftTrainer:
        torch.manual_seed(1)
        if model is None:
            config = config or ReftConfig(rank=4, positions="f2+l2", dropout=0.1)
            model = get_reft_model(word_llama, config)
        settings = {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 2e-2,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
        }
        return ReftTrainer(
            model,
            TrainingArguments(output_dir=str(tmp_path / folder), **{**settings, **arguments}),
            train_dataset=data,
            eval_dataset=eval_data,
            processing_class=word_tokenizer,
        )

    return build


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
def test_the_loss_goes_down_and_the_base_stays(make, word_llama, intervention, weight_decay):
    config = ReftConfig(intervention=intervention, rank=4, positions="f2+l2")
    before = {name: value.clone() for name, value in word_llama.state_dict().items()}
    trainer = make(config=config, weight_decay=weight_decay, max_steps=40)
    trainer.train()
    found = losses(trainer)
    assert found[0] > 0.4  # half of ln 3: one of three colours, and an end that the base knows
    assert sum(found[-3:]) / 3 < 0.25 * found[0]
    assert trainer.model.orthonormality_error() < 1e-5
    assert same(before, trainer.model.unload().state_dict())


def test_weight_decay_acts_on_matrices_and_not_on_biases_or_rotations(make):
    decayed = {}
    for intervention in ("loreft", "direft"):
        trainer = make(config=ReftConfig(intervention=intervention, rank=2), weight_decay=0.1)
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


def test_one_step_is_the_gradient_step_of_the_plain_loop(make, word_llama, word_tokenizer):
    trainer = make(
        config=ReftConfig(rank=2),
        data=RECORDS[:4],
        max_steps=1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    model = trainer.model
    start = trainable(model)
    batch = ReftDataCollator(word_tokenizer)(RECORDS[:4])
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


def test_gradient_accumulation_is_one_large_batch(make):
    # Completions of different lengths: a mean of means would be another loss.
    data = [*RECORDS[:3], {"prompt": "a", "completion": "red green blue yes no"}]
    results = []
    for size, accumulate in ((4, 1), (1, 4)):
        trainer = make(
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


ARGUMENTS = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "buckets": {"auto_find_batch_size": True},
    "adafactor": {"optim": "adafactor"},
    "bfloat16": {"bf16": True},
    "noise": {"neftune_noise_alpha": 1.0},
    "tokens": {"include_num_input_tokens_seen": "all"},
    "workers": {"dataloader_num_workers": 1},
}


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_trainer_offers_works_with_an_adapter(make, name):
    trainer = make(max_steps=2, **ARGUMENTS[name])
    start = trainable(trainer.model)
    trainer.train()
    after = trainable(trainer.model)
    assert not any(torch.equal(start[parameter], after[parameter]) for parameter in start)
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    if "checkpointing" not in name and name != "reentrant":
        return
    trainer.model.unload()
    plain = make(max_steps=2)
    plain.train()
    for parameter, value in trainable(plain.model).items():
        torch.testing.assert_close(after[parameter], value, rtol=1e-4, atol=1e-6)


def test_a_quantised_base_may_be_trained(make, word_llama):
    # What Trainer looks at, without the quantisation library.
    word_llama.is_quantized = True
    word_llama.hf_quantizer = SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(word_llama, TrainingArguments(report_to="none", use_cpu=True))
    trainer = make()
    trainer.train()
    assert not getattr(word_llama, "_hf_peft_config_loaded", False)


def test_several_visible_devices_do_not_make_it_data_parallel(make, caplog):
    trainer = make()
    trainer.args._n_gpu = 2
    again = ReftTrainer(
        trainer.model,
        trainer.args,
        train_dataset=RECORDS,
        processing_class=trainer.processing_class,
    )
    assert again.args.n_gpu == 1
    assert "torchrun" in caplog.text
    again.train()


# ------------------------------------------------------------------ disk


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(make, tmp_path):
    whole = make("whole", max_steps=6, weight_decay=0.01)
    whole.train()
    expected, logged = trainable(whole.model), losses(whole)
    whole.model.unload()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    first = make("split", max_steps=6, weight_decay=0.01, save_strategy="steps", save_steps=3)
    first.add_callback(Stop)
    first.train()
    stopped = trainable(first.model)
    assert not same(stopped, expected)
    first.model.unload()
    checkpoint = tmp_path / "split" / "checkpoint-3"

    second = make("split", max_steps=6, weight_decay=0.01)
    assert not same(trainable(second.model), stopped)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert same(trainable(second.model), expected)
    assert losses(second) == logged


def test_a_checkpoint_holds_the_adapter_and_no_base(make, tmp_path, word_llama):
    trainer = make(save_strategy="steps", save_steps=6)
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
    batch = ReftDataCollator(trainer.processing_class)(RECORDS)
    expected = trainer.model.eval()(**batch).logits
    loaded = ReftModel.from_pretrained(trainer.model.unload(), tmp_path / "published")
    torch.testing.assert_close(loaded.eval()(**batch).logits, expected, rtol=1e-5, atol=1e-6)


def test_the_best_model_comes_back_at_the_end(make):
    trainer = make(
        max_steps=8,
        eval_data=RECORDS,
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


def test_evaluate_is_the_loss_of_the_model(make, word_tokenizer):
    trainer = make(eval_data=RECORDS, per_device_eval_batch_size=12)
    metrics = trainer.evaluate()
    batch = ReftDataCollator(word_tokenizer)(RECORDS)
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).loss
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_metrics_see_logits_and_labels(make, word_tokenizer):
    seen = {}

    def compute_metrics(prediction):
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        labels = prediction.label_ids[:, 1:]
        right = prediction.predictions.argmax(-1)[:, :-1] == labels
        return {"accuracy": float(right[labels != -100].mean())}

    trainer = make(eval_data=RECORDS)
    trainer.compute_metrics = compute_metrics
    assert 0.0 <= trainer.evaluate()["eval_accuracy"] < 0.7
    assert seen["shapes"] == ((12, 6, len(word_tokenizer)), (12, 6))
    trainer.args.max_steps = 60
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.7
    predicted = trainer.predict(RECORDS[:2])
    assert predicted.predictions.shape == (2, 6, len(word_tokenizer))


def test_label_smoothing_and_own_losses_still_edit_the_prompt(make, word_tokenizer):
    # Both keep the labels from the model, which would otherwise take the answer for prompt too.
    batch = dict(ReftDataCollator(word_tokenizer)(RECORDS[:4]))
    trainer = make(config=ReftConfig(rank=2, positions="l1"), label_smoothing_factor=0.1)
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


def test_columns_that_no_one_reads_are_dropped_and_ours_are_kept(make):
    trainer = make(data=[{**record, "source": "x", "id": 1} for record in RECORDS])
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    features = [{"input_ids": [5, 6, 7], "prompt_lengths": 2, "source": [1, 2]}] * 4
    trainer.train_dataset = features
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "prompt_lengths"}
    assert {"input_ids", "attention_mask", "labels"} <= set(trainer._signature_columns)


@pytest.mark.parametrize("accepts", [None, True, False])
def test_the_trainer_knows_what_it_would_know_of_the_base_alone(make, word_llama, accepts):
    if accepts is not None:
        word_llama.accepts_loss_kwargs = accepts
    ours = make()
    arguments, base = ours.args, ours.model.unload()
    plain = Trainer(base, arguments)
    names = ("model_accepts_loss_kwargs", "label_names", "can_return_loss", "_loss_shifts_labels")
    for name in names:
        assert getattr(ours, name, None) == getattr(plain, name, None), name
    assert ours.label_names == ["labels"]
    plain._set_signature_columns_if_needed()
    ours = make()
    ours._set_signature_columns_if_needed()
    assert set(plain._signature_columns) < set(ours._signature_columns)


# ------------------------------------------------------------------ classifiers


@pytest.fixture
def classifier(word_tokenizer) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(word_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


LABELLED = [
    {"text": f"{letter} {number}", "label": list(COLORS).index(number)}
    for letter in "abcdef"
    for number in COLORS
]


def test_a_classifier_trains_its_head_and_both_come_back(make, classifier, tmp_path):
    config = ReftConfig(rank=4, positions="prompt", task_type="SEQ_CLS")
    head = {name: value.clone() for name, value in classifier.classifier.state_dict().items()}
    frozen = {
        n: v.clone() for n, v in classifier.bert.encoder.named_parameters() if "reft" not in n
    }

    def accuracy(prediction):
        return {
            "accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
        }

    trainer = make(
        model=get_reft_model(classifier, config),
        data=LABELLED,
        eval_data=LABELLED,
        max_steps=60,
        per_device_train_batch_size=18,
        save_strategy="steps",
        save_steps=60,
    )
    trainer.compute_metrics = accuracy
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == 1.0
    batch = ReftDataCollator(trainer.processing_class)(LABELLED)
    expected = trainer.model.eval()(**batch).logits
    trainer.save_model(str(tmp_path / "published"))

    # The same base, as someone else would have it: with the head it was made with.
    base = trainer.model.unload()
    for name, value in frozen.items():
        assert torch.equal(dict(base.bert.encoder.named_parameters())[name], value)
    base.classifier.load_state_dict(head)
    for folder in ("published", "run/checkpoint-60"):
        loaded = ReftModel.from_pretrained(base, tmp_path / folder).eval()
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-5, atol=1e-6)
        base = loaded.unload()
        base.classifier.load_state_dict(head)


# ------------------------------------------------------------------ what is refused


def test_a_model_without_adapter_is_refused(word_llama, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(TypeError, match=r"reft\.get_reft_model.*got LlamaForCausalLM"):
        ReftTrainer(word_llama, arguments)
    with pytest.raises(TypeError, match="got LlamaForCausalLM"):
        ReftTrainer(args=arguments, model_init=lambda: word_llama)


def test_model_init_works(word_llama, word_tokenizer, make, tmp_path):
    trainer = make()
    trainer.model.unload()
    again = ReftTrainer(
        args=trainer.args,
        model_init=lambda: get_reft_model(word_llama, ReftConfig(rank=2)),
        train_dataset=RECORDS,
        processing_class=word_tokenizer,
    )
    assert isinstance(again.model, ReftModel)
    assert again.label_names == ["labels"]


def test_without_accelerate_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("reft.train.trainer.is_accelerate_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'reft\[train\]'"):
        ReftTrainer(None)
