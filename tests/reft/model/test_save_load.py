"""Saving and loading: LoRA next to edits, gathered state dicts, several adapters in one folder."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from accelerate import Accelerator
from saved_models import logits, wrapped
from tiny_models import llama

from reft import ReftConfig, ReftModel
from reft.io.adapter_files import read_adapter


def lora(base):
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    return peft.get_peft_model(base, settings)


@pytest.mark.parametrize("door", ["wrapper", "peft", "inner"])
def test_lora_and_edits_are_both_saved(door, tmp_path):
    base = lora(llama())
    model = wrapped(base)
    expected = logits(model)
    saver = {"wrapper": model, "peft": base, "inner": model.get_base_model()}[door]
    saver.save_pretrained(tmp_path)
    lora_folder, edits = (
        (tmp_path, tmp_path / "reft") if door == "peft" else (tmp_path / "lora", tmp_path)
    )
    loaded = peft.PeftModel.from_pretrained(llama(), lora_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = ReftModel.from_pretrained(loaded, edits)
    assert torch.equal(logits(again), expected)
    unloaded = model.unload()
    unloaded.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "reft").exists()


def test_edits_loaded_without_the_lora_of_their_training_are_reported(tmp_path):
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
    read, gathered = (read_adapter(tmp_path / name / "reft")[1] for name in ("", "gathered"))
    assert all(torch.equal(value, gathered[name]) for name, value in read.items())
    base.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none" / "reft").exists()


def test_a_state_dict_that_accelerate_has_gathered(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(wrapped())
    state = accelerator.get_state_dict(model)
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        tmp_path, is_main_process=True, save_function=accelerator.save, state_dict=state
    )
    assert torch.equal(logits(ReftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path):
    for model in (wrapped(), wrapped(lora(llama()))):
        model.save_pretrained(tmp_path / "no", is_main_process=False)
        model.save_pretrained(tmp_path / "no", is_main_process=False, state_dict={})
    assert not (tmp_path / "no").exists()


def test_selected_adapters_are_in_the_subfolders_of_pefts_layout(tmp_path):
    model = wrapped()
    model.add_adapter("wide", ReftConfig(rank=5))
    model.save_pretrained(tmp_path, selected_adapters=["wide", "default"])
    again = ReftModel.from_pretrained(llama(), tmp_path)
    again.load_adapter(tmp_path, "wide", subfolder="wide")
    assert {name: config.rank for name, config in again.configs.items()} == {
        "default": 3,
        "wide": 5,
    }
    assert torch.equal(logits(again), logits(model))
    again.set_adapter("wide")
    model.set_adapter("wide")
    assert torch.equal(logits(again), logits(model))
