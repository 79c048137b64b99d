"""Names of a classifier's classes, and heads that nothing trains."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
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
from reft.io.adapter_files import WEIGHTS_FILE, read_adapter

NAMES = {0: "non", 1: "peut-être", 2: "oui"}


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 2, "positions": "f2", "task_type": "SEQ_CLS", **changes})


def named(names=NAMES, build=bert):
    base = build()
    base.config.id2label = dict(names)
    base.config.label2id = {name: number for number, name in names.items()}
    return base


def said(caplog) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name.startswith("reft")]


class TestNames:
    @pytest.mark.parametrize("training_state", [True, False])
    def test_they_survive_a_reload(self, training_state, tmp_path):
        model = get_reft_model(named(), config())
        model.save_pretrained(tmp_path, training_state=training_state)
        base = bert()
        before = dict(base.config.id2label), dict(base.config.label2id)
        if training_state:
            again = get_reft_model(base, config(), "other")
            again.load_adapter(tmp_path, "back")
        else:
            again = ReftModel.from_pretrained(base, tmp_path)
        assert again.config.id2label == NAMES
        assert again.config.label2id == {"non": 0, "peut-être": 1, "oui": 2}
        assert base.config.num_labels == 3
        again.save_pretrained(tmp_path / "twice")
        assert ReftModel.from_pretrained(bert(), tmp_path / "twice").config.id2label == NAMES
        again.unload()
        assert (base.config.id2label, base.config.label2id) == before

    @pytest.mark.parametrize(
        "names",
        [{0: "a", 1: "b", 2: "c"}, {0: "oui", 1: "peut-être", 2: "non"}],
        ids=["others", "order"],
    )
    def test_other_names_stay_with_a_warning(self, names, tmp_path, caplog):
        get_reft_model(named(), config()).save_pretrained(tmp_path)
        base = named(names)
        with caplog.at_level(logging.WARNING, "reft"):
            model = ReftModel.from_pretrained(base, tmp_path)
        assert "trained for the classes ['non', 'peut-être', 'oui']" in caplog.text
        assert base.config.id2label == names
        model.unload()
        assert base.config.id2label == names

    def test_equal_names_and_none_are_silent(self, tmp_path, caplog):
        get_reft_model(named(), config()).save_pretrained(tmp_path / "named")
        get_reft_model(bert(), config()).save_pretrained(tmp_path / "generic")
        with caplog.at_level(logging.WARNING, "reft"):
            assert ReftModel.from_pretrained(named(), tmp_path / "named").config.id2label == NAMES
            model = ReftModel.from_pretrained(named(), tmp_path / "generic")
        assert model.config.id2label == NAMES
        assert not said(caplog)

    def test_a_second_adapter_does_not_rename(self, tmp_path, caplog):
        get_reft_model(named(), config()).save_pretrained(tmp_path / "first")
        other = {0: "x", 1: "y", 2: "z"}
        get_reft_model(named(other), config()).save_pretrained(tmp_path / "second")
        base = bert()
        model = ReftModel.from_pretrained(base, tmp_path / "first")
        model.load_adapter(tmp_path / "second", "second")
        assert base.config.id2label == NAMES
        assert "['x', 'y', 'z']" in caplog.text
        assert model.unload().config.id2label == bert().config.id2label

    def test_files_without_names_are_read(self, tmp_path):
        """Also one whose header somebody has lost: the configuration lies beside it."""
        get_reft_model(named(), config()).save_pretrained(tmp_path)
        save_file(load_file(tmp_path / WEIGHTS_FILE), tmp_path / WEIGHTS_FILE)
        model = ReftModel.from_pretrained(bert(), tmp_path)
        assert model.config.id2label == bert().config.id2label
        assert model.configs["default"] == read_adapter(tmp_path)[0]

    @pytest.mark.parametrize("text", ['{"a": 1}', "[1, 2, 3]", "[]", "[", '["\\ud800"]'])
    def test_what_is_no_list_of_names_is_refused(self, text, tmp_path):
        get_reft_model(named(), config()).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / WEIGHTS_FILE)
        save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"label_names": text})
        base = bert()
        with pytest.raises(ValueError, match="label_names"):
            ReftModel.from_pretrained(base, tmp_path)
        assert not hasattr(base, "reft")

    def test_a_base_without_classes(self, tmp_path):
        model = get_reft_model(llama(), config(task_type=None))
        model.save_pretrained(tmp_path)
        assert (
            ReftModel.from_pretrained(llama(), tmp_path).config.id2label == llama().config.id2label
        )


def distilbert():
    sizes = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes))


class TestFrozenHeads:
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
    def test_one_that_may_be_new_is_reported(self, build, changes, words, caplog):
        with caplog.at_level(logging.WARNING, "reft"):
            get_reft_model(build(), config(**{"task_type": None, **changes}))
        [message] = said(caplog)
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
    def test_nothing_to_report(self, build, changes, caplog):
        with caplog.at_level(logging.WARNING, "reft"):
            get_reft_model(build(), config(**changes))
        assert not said(caplog)

    @pytest.mark.parametrize("kind", ["bert", "llama"])
    def test_what_was_read_from_a_file_may_stay_frozen(self, kind, tmp_path, caplog):
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
        assert not said(caplog)

    def test_a_new_pooler_below_a_trained_head(self, tmp_path, caplog):
        BertForMaskedLM(bert().config).save_pretrained(tmp_path)
        base = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
        with caplog.at_level(logging.WARNING, "reft"):
            get_reft_model(base, config())
        assert "leaves bert.pooler of" in caplog.text
        caplog.clear()
        base = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
        with caplog.at_level(logging.WARNING, "reft"):
            get_reft_model(base, config(modules_to_save=["bert.pooler"]))
        assert not said(caplog)

    def test_an_adapter_that_is_loaded_without_a_head(self, tmp_path, caplog):
        get_reft_model(bert(), config(task_type=None)).save_pretrained(tmp_path)
        caplog.clear()
        ReftModel.from_pretrained(bert(), tmp_path)
        assert "leaves classifier of BertForSequenceClassification frozen" in caplog.text
