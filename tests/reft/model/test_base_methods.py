"""Methods that the base gets while adapters are attached: it saves and counts adapters too."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from saved_models import files, logits, wrapped
from tiny_models import bert, gpt2, llama
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from reft import ReftConfig, ReftModel
from reft.io.adapter_files import WEIGHTS_FILE, read_adapter

# ------------------------------------------------------------------------ objects


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_the_base_writes_the_adapter_until_it_is_unloaded(make, tmp_path):
    modules = {"modules_to_save": ["classifier"]} if make is bert else {}
    model = wrapped(make(), ReftConfig(rank=3, positions="f2+l2", **modules))
    base = model.get_base_model()
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "wrapper")
    assert files(tmp_path / "base") == files(tmp_path / "wrapper")
    config, by_base = read_adapter(tmp_path / "base")
    _, by_wrapper = read_adapter(tmp_path / "wrapper")
    assert config == model.configs["default"]
    assert by_base.keys() == by_wrapper.keys()
    assert all(torch.equal(value, by_wrapper[name]) for name, value in by_base.items())
    again = ReftModel.from_pretrained(make(), tmp_path / "base")
    assert torch.equal(logits(again), logits(model))
    assert base.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    with model.disable_adapter():
        plain = logits(model)
    assert model.unload() is base
    base.save_pretrained(tmp_path / "bare")
    assert (tmp_path / "bare" / "config.json").exists()
    kind = type(base)
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "bare").eval()), plain)
    assert base.save_pretrained.__func__ is PreTrainedModel.save_pretrained
    assert not hasattr(base, "print_trainable_parameters")


def test_the_base_counts_what_is_trained(capsys):
    model = wrapped()
    model.get_base_model().print_trainable_parameters()
    model.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.startswith("trainable params: ")


def test_an_earlier_attribute_of_the_base_is_restored(tmp_path):
    base, calls = llama(), []
    base.save_pretrained = calls.append
    model = wrapped(base)
    base.save_pretrained(tmp_path)
    assert WEIGHTS_FILE in files(tmp_path)
    model.unload().save_pretrained("folder")
    assert calls == ["folder"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda base: pickle.loads(pickle.dumps(base))])
def test_a_copy_of_the_base_saves_its_own_adapter(how, tmp_path):
    model = wrapped()
    twin = how(model.get_base_model())
    with torch.no_grad():
        twin.reft.adapter("default").bias.add_(1.0)
    twin.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS_FILE)["bias"]
    assert torch.equal(stored, model.reft.adapter("default").bias + 1.0)


def test_without_an_active_adapter_the_base_saves_nothing(tmp_path):
    model = wrapped()
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="adapter_name must be given, no adapter is active"):
        model.get_base_model().save_pretrained(tmp_path)
    assert not files(tmp_path)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("door", ["wrapper", "base"])
def test_what_transformers_trainer_writes_can_be_loaded(door, gathered, tmp_path):
    model = wrapped()
    trained = model if door == "wrapper" else model.get_base_model()
    trainer = Trainer(trained, TrainingArguments(str(tmp_path / "run"), use_cpu=True))
    if door == "base":
        state = trained.state_dict() if gathered else None
        trainer._save(str(tmp_path / "out"), state)
        again = ReftModel.from_pretrained(llama(), tmp_path / "out")
    else:
        trainer.save_model(str(tmp_path / "out"))
        again = wrapped(seed=4)
        again.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert torch.equal(logits(again), logits(model))


def test_a_pipeline_of_the_base_saves_the_adapter(word_llama, word_tokenizer, tmp_path):
    model = wrapped(word_llama)
    pipe = pipeline("text-generation", model=model.get_base_model(), tokenizer=word_tokenizer)
    pipe.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS_FILE)
    assert torch.equal(stored["bias"], model.reft.adapter("default").bias)
    model.unload()
