"""What TRL's trainers have trained is saved by whatever object saves it: the model inside them,
which is the base, the wrapper, the trainer, a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from trl import DPOConfig, KTOConfig, SFTConfig
from trl_runs import SETTINGS, wrapped

from reft import ReftDPOTrainer, ReftKTOTrainer, ReftModel, ReftSFTTrainer

KINDS = {
    "sft": (ReftSFTTrainer, SFTConfig),
    "dpo": (ReftDPOTrainer, DPOConfig),
    "kto": (ReftKTOTrainer, KTOConfig),
}


@pytest.fixture(params=KINDS)
def trained_one(request, word_llama, word_tokenizer, color_records, tmp_path):
    """(a copy of the base before, the wrapper, a trainer that has trained it)"""
    trainer_class, config_class = KINDS[request.param]
    rows = [
        {**one, "chosen": one["completion"], "rejected": "no", "label": index % 2 == 0}
        for index, one in enumerate(color_records)
    ]
    columns = {"dpo": ["prompt", "chosen", "rejected"], "kto": ["prompt", "completion", "label"]}
    names = columns.get(request.param, ["prompt", "completion"])
    base = copy.deepcopy(word_llama)
    model = wrapped(word_llama, modules_to_save=["lm_head"])
    settings = {**SETTINGS, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_class(
        model,
        args=config_class(str(tmp_path / "run"), **settings),
        train_dataset=Dataset.from_list(rows).select_columns(names),
        processing_class=word_tokenizer,
    )
    trainer.train()
    return base, model.eval(), trainer


def test_it_loads_to_the_same_bits(trained_one, word_tokenizer, tmp_path):
    base, model, trainer = trained_one
    trainer.model.save_pretrained(tmp_path / "inner")
    model.save_pretrained(tmp_path / "wrapper")
    trainer.save_model(str(tmp_path / "trainer"))
    ids = word_tokenizer("a : one", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
    for folder in ("inner", "wrapper", "trainer", "run/checkpoint-2"):
        names = {path.name for path in (tmp_path / folder).iterdir()}
        assert "adapter_model.safetensors" in names
        assert not names & {"model.safetensors", "pytorch_model.bin"}
        loaded = ReftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, expected), folder
        assert "reference" not in names or folder.startswith("run")


def test_parameters_are_counted(trained_one, capsys):
    _, model, trainer = trained_one
    trainer.model.print_trainable_parameters()
    inner = capsys.readouterr().out
    model.print_trainable_parameters()
    assert inner == capsys.readouterr().out
    assert "trainable params" in inner
