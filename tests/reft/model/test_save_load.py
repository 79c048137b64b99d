"""Whoever saves a model with adapters, by whatever object and with whose keywords, saves them."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_models import bert, gpt2, llama, moved, tokens
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from reft import ReftConfig, ReftModel, get_reft_model
from reft.io.adapter_files import WEIGHTS_FILE, read_adapter

IDS = tokens(2, 7)
CONFIG = ReftConfig(rank=3, positions="f2+l2")


def wrapped(base=None, config=CONFIG, seed=3):
    base = llama() if base is None else base
    torch.manual_seed(seed)
    return moved(get_reft_model(base, config), 0.1)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def files(folder: Path) -> set[str]:
    return {str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file()}


# ------------------------------------------------------------------------ objects


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_the_base_writes_the_adapter_until_it_is_unloaded(make, tmp_path):
    heads = {"modules_to_save": ["classifier"]} if make is bert else {}
    model = wrapped(make(), ReftConfig(rank=3, positions="f2+l2", **heads))
    base = model.get_base_model()
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "wrapper")
    assert files(tmp_path / "base") == files(tmp_path / "wrapper")
    (config, mine), (_, theirs) = (read_adapter(tmp_path / one) for one in ("base", "wrapper"))
    assert config == model.configs["default"]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
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


def test_what_stood_in_the_base_stands_there_again(tmp_path):
    base, said = llama(), []
    base.save_pretrained = said.append
    model = wrapped(base)
    base.save_pretrained(tmp_path)
    assert WEIGHTS_FILE in files(tmp_path)
    model.unload().save_pretrained("mine")
    assert said == ["mine"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_of_the_base_saves_its_own(how, tmp_path):
    model = wrapped()
    twin = how(model.get_base_model())
    with torch.no_grad():
        twin.reft.adapter("default").bias.add_(1.0)
    twin.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS_FILE)["bias"]
    assert torch.equal(stored, model.reft.adapter("default").bias + 1.0)


def test_without_an_active_adapter_the_base_says_so(tmp_path):
    model = wrapped()
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="adapter_name must be given, no adapter is active"):
        model.get_base_model().save_pretrained(tmp_path)
    assert not files(tmp_path)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("door", ["wrapper", "base"])
def test_transformers_trainer_writes_what_loads(door, gathered, tmp_path):
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


def lora(base):
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    return peft.get_peft_model(base, settings)


@pytest.mark.parametrize("door", ["wrapper", "peft", "inner"])
def test_lora_and_edits_are_both_saved(door, tmp_path):
    base = lora(llama())
    model = wrapped(base)
    expected = logits(model)
    one = {"wrapper": model, "peft": base, "inner": model.get_base_model()}[door]
    one.save_pretrained(tmp_path)
    beside, edits = (
        (tmp_path, tmp_path / "reft") if door == "peft" else (tmp_path / "lora", tmp_path)
    )
    loaded = peft.PeftModel.from_pretrained(llama(), beside)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = ReftModel.from_pretrained(loaded, edits)
    assert torch.equal(logits(again), expected)
    unloaded = model.unload()
    unloaded.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "reft").exists()


def test_edits_without_the_lora_they_were_trained_beside_are_reported(tmp_path):
    model = wrapped(lora(llama()))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"trained together with the LoRA in .*lora.*PeftModel"):
        ReftModel.from_pretrained(llama(), tmp_path)


def test_every_adapter_of_a_wrapper_of_pefts_is_saved(tmp_path):
    base = lora(llama())
    model = wrapped(base)
    model.add_adapter("second", ReftConfig(rank=2))
    base.save_pretrained(tmp_path)
    for folder, rank in ((tmp_path / "reft", 3), (tmp_path / "reft" / "second", 2)):
        assert read_adapter(folder)[0].rank == rank
    base.save_pretrained(tmp_path / "gathered", state_dict=base.state_dict())
    mine, theirs = (read_adapter(tmp_path / one / "reft")[1] for one in ("", "gathered"))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    base.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none" / "reft").exists()


# ------------------------------------------------------------------------ keywords of saving

ACCELERATOR = Accelerator(cpu=True)
OBEYED = {
    "sentence-transformers": {"safe_serialization": True},
    "accelerate": {"is_main_process": True, "save_function": ACCELERATOR.save},
    "transformers": {"max_shard_size": "5GB", "push_to_hub": False, "variant": None},
    "transformers' PEFT": {"save_peft_format": True, "save_original_format": True},
    "peft": {"selected_adapters": ["default"], "save_embedding_layers": "auto"},
}


@pytest.mark.parametrize("keywords", OBEYED.values(), ids=OBEYED)
@pytest.mark.parametrize("door", ["wrapper", "base"])
def test_keywords_of_other_libraries_are_taken(door, keywords, tmp_path):
    model = wrapped()
    one = model if door == "wrapper" else model.get_base_model()
    one.save_pretrained(tmp_path, **keywords)
    assert torch.equal(logits(ReftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_the_state_of_accelerate_is_taken(tmp_path):
    model = ACCELERATOR.prepare(wrapped())
    state = ACCELERATOR.get_state_dict(model)
    unwrapped = ACCELERATOR.unwrap_model(model)
    unwrapped.save_pretrained(
        tmp_path, is_main_process=True, save_function=ACCELERATOR.save, state_dict=state
    )
    assert torch.equal(logits(ReftModel.from_pretrained(llama(), tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("keywords", "kind", "said"),
    [
        ({"safe_serialization": False}, ValueError, "safe_serialization.*no pickle is written"),
        ({"push_to_hub": True}, ValueError, r"push_to_hub.*ReftModel\.push_to_hub\(repo_id\)"),
        ({"save_embedding_layers": True}, ValueError, "modules_to_save"),
        ({"variant": "fp16"}, ValueError, "variant of save_pretrained must be None, got 'fp16'"),
        ({"selected_adapters": "default"}, TypeError, "must be a list of names, got 'default'"),
        ({"selected_adapters": []}, ValueError, "must be a list of names"),
        ({"selected_adapters": ["other"]}, ValueError, "adapter_name must be one of"),
        ({"selected_adapters": ["default", "no"]}, ValueError, "adapter_name must be one of"),
        (
            {"selected_adapters": ["default"], "adapter_name": "default"},
            ValueError,
            "stand alone",
        ),
        ({"is_trainable": True}, TypeError, r"ReftModel\.save_pretrained\(\).*'is_trainable'"),
    ],
)
def test_what_would_not_be_obeyed_is_refused_before_anything_is_written(
    keywords, kind, said, tmp_path
):
    for one in (wrapped(), wrapped().get_base_model()):
        with pytest.raises(kind, match=said):
            one.save_pretrained(tmp_path / "new", **keywords)
    assert not (tmp_path / "new").exists()


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path):
    for one in (wrapped(), wrapped(lora(llama()))):
        one.save_pretrained(tmp_path / "no", is_main_process=False)
        one.save_pretrained(tmp_path / "no", is_main_process=False, state_dict={})
    assert not (tmp_path / "no").exists()


def test_selected_adapters_lie_where_peft_puts_them(tmp_path):
    model = wrapped()
    model.add_adapter("wide", ReftConfig(rank=5))
    model.save_pretrained(tmp_path, selected_adapters=["wide", "default"])
    again = ReftModel.from_pretrained(llama(), tmp_path)
    again.load_adapter(tmp_path, "wide", subfolder="wide")
    assert {name: one.rank for name, one in again.configs.items()} == {"default": 3, "wide": 5}
    assert torch.equal(logits(again), logits(model))
    again.set_adapter("wide")
    model.set_adapter("wide")
    assert torch.equal(logits(again), logits(model))


def test_a_pipeline_of_the_base_saves_the_adapter(word_llama, word_tokenizer, tmp_path):
    model = wrapped(word_llama)
    pipe = pipeline("text-generation", model=model.get_base_model(), tokenizer=word_tokenizer)
    pipe.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS_FILE)
    assert torch.equal(stored["bias"], model.reft.adapter("default").bias)
    model.unload()
