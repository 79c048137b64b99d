"""Class names that are stored with an adapter and given to a base without names."""

from __future__ import annotations

import logging

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import bert, llama

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


def messages(caplog) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.name.startswith("reft")]


@pytest.mark.parametrize("training_state", [True, False])
def test_they_survive_a_reload(training_state, tmp_path):
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
def test_other_names_stay_with_a_warning(names, tmp_path, caplog):
    get_reft_model(named(), config()).save_pretrained(tmp_path)
    base = named(names)
    with caplog.at_level(logging.WARNING, "reft"):
        model = ReftModel.from_pretrained(base, tmp_path)
    assert "trained for the classes ['non', 'peut-être', 'oui']" in caplog.text
    assert base.config.id2label == names
    model.unload()
    assert base.config.id2label == names


def test_equal_names_and_none_are_silent(tmp_path, caplog):
    get_reft_model(named(), config()).save_pretrained(tmp_path / "named")
    get_reft_model(bert(), config()).save_pretrained(tmp_path / "generic")
    with caplog.at_level(logging.WARNING, "reft"):
        assert ReftModel.from_pretrained(named(), tmp_path / "named").config.id2label == NAMES
        model = ReftModel.from_pretrained(named(), tmp_path / "generic")
    assert model.config.id2label == NAMES
    assert not messages(caplog)


def test_a_second_adapter_does_not_rename(tmp_path, caplog):
    get_reft_model(named(), config()).save_pretrained(tmp_path / "first")
    other = {0: "x", 1: "y", 2: "z"}
    get_reft_model(named(other), config()).save_pretrained(tmp_path / "second")
    base = bert()
    model = ReftModel.from_pretrained(base, tmp_path / "first")
    model.load_adapter(tmp_path / "second", "second")
    assert base.config.id2label == NAMES
    assert "['x', 'y', 'z']" in caplog.text
    assert model.unload().config.id2label == bert().config.id2label


def test_files_without_names_are_read(tmp_path):
    """A file without a header is read too: the configuration is in the JSON file beside it."""
    get_reft_model(named(), config()).save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS_FILE), tmp_path / WEIGHTS_FILE)
    model = ReftModel.from_pretrained(bert(), tmp_path)
    assert model.config.id2label == bert().config.id2label
    assert model.configs["default"] == read_adapter(tmp_path)[0]


@pytest.mark.parametrize("text", ['{"a": 1}', "[1, 2, 3]", "[]", "[", '["\\ud800"]'])
def test_what_is_no_list_of_names_is_refused(text, tmp_path):
    get_reft_model(named(), config()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"label_names": text})
    base = bert()
    with pytest.raises(ValueError, match="label_names"):
        ReftModel.from_pretrained(base, tmp_path)
    assert not hasattr(base, "reft")


def test_a_base_without_classes(tmp_path):
    model = get_reft_model(llama(), config(task_type=None))
    model.save_pretrained(tmp_path)
    assert ReftModel.from_pretrained(llama(), tmp_path).config.id2label == llama().config.id2label
