"""Warnings about classification heads that are untrained and stay frozen."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from tiny_models import bert, llama
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaForSequenceClassification,
    LlamaModel,
)

from reft import ReftConfig, ReftModel, get_reft_model


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 2, "positions": "f2", "task_type": "SEQ_CLS", **changes})


def messages(caplog) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.name.startswith("reft")]


def distilbert():
    sizes = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes))


@pytest.mark.parametrize(
    ("build", "changes", "words"),
    [
        (bert, {}, r'classifier .*task_type="SEQ_CLS".*modules_to_save=\[\'classifier\'\]'),
        (
            lambda: LlamaForSequenceClassification(llama().config),
            {},
            r'score .*task_type="SEQ_CLS"',
        ),
        (
            lambda: BertForTokenClassification(bert().config),
            {},
            r'classifier .*task_type="TOKEN_CLS"',
        ),
        (
            lambda: BertForQuestionAnswering(bert().config),
            {"task_type": "SEQ_CLS"},
            r'qa_outputs .*task_type="QUESTION_ANS"',
        ),
        (distilbert, {"task_type": "SEQ_CLS"}, r"modules_to_save=\['pre_classifier'\]"),
    ],
    ids=["bert", "llama", "tokens", "question", "distilbert"],
)
def test_a_head_that_may_be_new_is_reported(build, changes, words, caplog):
    with caplog.at_level(logging.WARNING, "reft"):
        get_reft_model(build(), config(**{"task_type": None, **changes}))
    [message] = messages(caplog)
    assert re.search(words, message)
    assert "its values are random" in message


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (bert, {}),
        (bert, {"task_type": None, "modules_to_save": ["classifier"]}),
        (distilbert, {"modules_to_save": ["pre_classifier"]}),
        (llama, {"task_type": None}),
        (lambda: BertForMaskedLM(bert().config), {"task_type": None}),
    ],
    ids=["task", "modules", "both", "causal", "masked"],
)
def test_nothing_to_report(build, changes, caplog):
    with caplog.at_level(logging.WARNING, "reft"):
        get_reft_model(build(), config(**changes))
    assert not messages(caplog)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_head_that_was_read_from_a_file_may_stay_frozen(kind, tmp_path, caplog):
    classifier, stack = {
        "bert": (BertForSequenceClassification, bert().bert),
        "llama": (LlamaForSequenceClassification, LlamaModel(llama().config)),
    }[kind]
    stack.save_pretrained(tmp_path / "stack")
    new = classifier.from_pretrained(tmp_path / "stack", num_labels=3)
    with caplog.at_level(logging.WARNING, "reft"):
        get_reft_model(new, config(task_type=None))
    assert "whose values are random, in no file of the base" in caplog.text
    caplog.clear()
    classifier.from_pretrained(tmp_path / "stack", num_labels=3).save_pretrained(tmp_path / "a")
    old = classifier.from_pretrained(tmp_path / "a").to(torch.bfloat16)
    with caplog.at_level(logging.WARNING, "reft"):
        get_reft_model(old, config(task_type=None))
    assert not messages(caplog)


def test_a_new_pooler_below_a_trained_head(tmp_path, caplog):
    BertForMaskedLM(bert().config).save_pretrained(tmp_path)
    base = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    with caplog.at_level(logging.WARNING, "reft"):
        get_reft_model(base, config())
    assert "leaves bert.pooler of" in caplog.text
    caplog.clear()
    base = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    with caplog.at_level(logging.WARNING, "reft"):
        get_reft_model(base, config(modules_to_save=["bert.pooler"]))
    assert not messages(caplog)


def test_an_adapter_that_is_loaded_without_a_head(tmp_path, caplog):
    get_reft_model(bert(), config(task_type=None)).save_pretrained(tmp_path)
    caplog.clear()
    ReftModel.from_pretrained(bert(), tmp_path)
    assert "leaves classifier of BertForSequenceClassification frozen" in caplog.text
