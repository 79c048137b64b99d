"""ReftTrainer takes Trainer's arguments, columns, devices and models, classifiers among them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from trainer_runs import losses, trainable_values
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from reft.config import ReftConfig
from reft.model.reft_model import ReftModel, get_reft_model
from reft.train.collate import ReftDataCollator
from reft.train.trainer import ReftTrainer

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
def test_arguments_of_trainer_work_with_an_adapter(make_trainer, name):
    trainer = make_trainer(max_steps=2, **ARGUMENTS[name])
    start = trainable_values(trainer.model)
    trainer.train()
    after = trainable_values(trainer.model)
    assert not any(torch.equal(start[parameter], after[parameter]) for parameter in start)
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    if "checkpointing" not in name and name != "reentrant":
        return
    trainer.model.unload()
    plain = make_trainer(max_steps=2)
    plain.train()
    for parameter, value in trainable_values(plain.model).items():
        torch.testing.assert_close(after[parameter], value, rtol=1e-4, atol=1e-6)


def test_a_quantised_base_may_be_trained(make_trainer, word_llama):
    # The attributes that Trainer reads, without the quantisation library.
    word_llama.is_quantized = True
    word_llama.hf_quantizer = SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(word_llama, TrainingArguments(report_to="none", use_cpu=True))
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert not getattr(word_llama, "_hf_peft_config_loaded", False)


def test_several_visible_devices_do_not_make_it_data_parallel(make_trainer, caplog, color_records):
    trainer = make_trainer()
    trainer.args._n_gpu = 2
    again = ReftTrainer(
        trainer.model,
        trainer.args,
        train_dataset=color_records,
        processing_class=trainer.processing_class,
    )
    assert again.args.n_gpu == 1
    assert "torchrun" in caplog.text


def test_unused_columns_are_dropped_and_the_wrappers_are_kept(make_trainer, color_records):
    trainer = make_trainer(data=[{**record, "source": "x", "id": 1} for record in color_records])
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    features = [{"input_ids": [5, 6, 7], "prompt_lengths": 2, "source": [1, 2]}] * 4
    trainer.train_dataset = features
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "prompt_lengths"}
    assert {"input_ids", "attention_mask", "labels"} <= set(trainer._signature_columns)


@pytest.mark.parametrize("accepts", [None, True, False])
def test_the_trainer_inspects_the_base_model(make_trainer, word_llama, accepts):
    if accepts is not None:
        word_llama.accepts_loss_kwargs = accepts
    ours = make_trainer()
    arguments, base = ours.args, ours.model.unload()
    plain = Trainer(base, arguments)
    names = ("model_accepts_loss_kwargs", "label_names", "can_return_loss", "_loss_shifts_labels")
    for name in names:
        assert getattr(ours, name, None) == getattr(plain, name, None), name
    assert ours.label_names == ["labels"]
    plain._set_signature_columns_if_needed()
    ours = make_trainer()
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
    {"text": f"{letter} {number}", "label": label}
    for letter in "abcdef"
    for label, number in enumerate(["one", "two", "three"])
]


def test_a_classifier_trains_its_head_and_both_come_back(make_trainer, classifier, tmp_path):
    config = ReftConfig(rank=4, positions="prompt", task_type="SEQ_CLS")
    head = {name: value.clone() for name, value in classifier.classifier.state_dict().items()}
    frozen = {
        n: v.clone() for n, v in classifier.bert.encoder.named_parameters() if "reft" not in n
    }

    def accuracy(prediction):
        return {
            "accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
        }

    trainer = make_trainer(
        model=get_reft_model(classifier, config),
        data=LABELLED,
        eval_data=LABELLED,
        max_steps=40,
        per_device_train_batch_size=18,
        save_strategy="steps",
        save_steps=40,
    )
    trainer.compute_metrics = accuracy
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == 1.0
    batch = ReftDataCollator(trainer.processing_class)(LABELLED)
    expected = trainer.model.eval()(**batch).logits
    trainer.save_model(str(tmp_path / "published"))

    # A fresh base of the same weights has its initial head.
    base = trainer.model.unload()
    for name, value in frozen.items():
        assert torch.equal(dict(base.bert.encoder.named_parameters())[name], value)
    base.classifier.load_state_dict(head)
    for folder in ("published", "run/checkpoint-40"):
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


def test_model_init_works(word_llama, word_tokenizer, make_trainer, tmp_path, color_records):
    trainer = make_trainer()
    trainer.model.unload()
    again = ReftTrainer(
        args=trainer.args,
        model_init=lambda: get_reft_model(word_llama, ReftConfig(rank=2)),
        train_dataset=color_records,
        processing_class=word_tokenizer,
    )
    assert isinstance(again.model, ReftModel)
    assert again.label_names == ["labels"]


def test_without_accelerate_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("reft.train.trainer.is_accelerate_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'reft\[train\]'"):
        ReftTrainer(None)
