"""Adapters name the library and the base that they belong to."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
from saved_models import wrapped
from tiny_models import llama
from transformers import AutoModel, AutoModelForCausalLM

from reft import ReftConfig, ReftModel
from reft.io.adapter_files import CONFIG_FILE, read_adapter
from reft.model.origins import is_same

# ------------------------------------------------------------------------ another library


@pytest.mark.parametrize("origin", ["here", None, "no/such-model"])
def test_peft_and_transformers_name_the_library_of_the_folder(origin, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    name = str(tmp_path / "base") if origin == "here" else origin
    config = ReftConfig(rank=2, base_model_name_or_path=name)
    folder = str(tmp_path / "adapter")
    wrapped(config=config).save_pretrained(folder)
    ways = {
        "PeftModel": lambda: peft.PeftModel.from_pretrained(llama(), folder),
        "PeftConfig": lambda: peft.PeftConfig.from_pretrained(folder),
        "AutoPeftModel": lambda: peft.AutoPeftModelForCausalLM.from_pretrained(folder),
    }
    if origin == "here":
        ways |= {
            "AutoModel": lambda: AutoModel.from_pretrained(folder),
            "AutoModelForCausalLM": lambda: AutoModelForCausalLM.from_pretrained(folder),
            "the class": lambda: type(llama()).from_pretrained(folder),
        }
    for way, load in ways.items():
        with pytest.raises(Exception, match=r"reft\.ReftModel\.from_pretrained") as caught:
            load()
        assert "package reft" in str(caught.value), way


def test_the_entry_for_peft_is_in_the_json_file_alone(tmp_path):
    wrapped().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert stored.pop("peft_type").startswith("REFT: ")
    assert stored == read_adapter(tmp_path)[0].to_dict()
    (tmp_path / CONFIG_FILE).write_text(json.dumps(stored))  # as earlier versions wrote it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_adapter(tmp_path)[0].to_dict() == stored
    assert ReftConfig.from_dict({**stored, "peft_type": "REFT"}).to_dict() == stored


@pytest.mark.parametrize("kind", ["LORA", "REFTY", 3, None])
def test_an_adapter_of_peft_is_refused(kind, tmp_path):
    wrapped().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**stored, "peft_type": kind}))
    with pytest.raises(ValueError, match=f"one of PEFT's, peft_type {kind!r}; peft.PeftModel"):
        ReftModel.from_pretrained(llama(), tmp_path)


# ------------------------------------------------------------------------ another base


def named(name):
    base = llama()
    base.config._name_or_path = name
    return base


@pytest.mark.parametrize("door", ["from_pretrained", "load_adapter", "pool"])
def test_another_base_of_the_same_shape_is_reported_with_both_names(door, tmp_path):
    wrapped(named("meta/llama-3")).save_pretrained(tmp_path)

    def load(base):
        if door == "from_pretrained":
            ReftModel.from_pretrained(base, tmp_path)
        elif door == "load_adapter":
            wrapped(base).load_adapter(tmp_path, "second")
        else:
            wrapped(base).pool.add("second", tmp_path)

    with pytest.warns(UserWarning) as caught:
        load(named("other/llama-2"))
    messages = [str(warning.message) for warning in caught]
    [message] = [message for message in messages if "made for the base" in message]
    assert "'meta/llama-3'" in message and "'other/llama-2'" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for name in ("meta/llama-3", "/models/llama-3/", "LLaMA-3", ""):
            load(named(name))


def test_folders_are_the_same_by_any_spelling(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    cached = f"/cache/hub/models--meta--llama-3/snapshots/{'0' * 40}"
    for pair in (
        ("base", str(tmp_path / "base")),
        ("base", "./base/"),
        ("base", "other/../link"),
        ("meta/llama-3", cached),
        ("/a/llama-3", cached),
        ("C:\\models\\llama-3", "meta/llama-3"),
    ):
        assert is_same(*pair) and is_same(*pair[::-1]), pair
    for pair in (("base", "other"), ("meta/llama-3", "meta/llama-2"), ("llama", cached)):
        assert not is_same(*pair), pair


def test_restoring_over_another_base_is_reported(tmp_path):
    wrapped(named("meta/llama-3")).save_pretrained(tmp_path, training_state=True)
    with pytest.warns(UserWarning, match="meta/llama-3.*other/llama-2"):
        wrapped(named("other/llama-2")).restore(tmp_path)
