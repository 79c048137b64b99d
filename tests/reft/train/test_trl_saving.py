"""Saving what TRL's trainers trained, by the base, the wrapper, the trainer or a checkpoint."""

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


@pytest.mark.parametrize("name", KINDS)
def test_every_way_of_saving_loads_to_the_same_bits(
    word_llama, word_tokenizer, color_records, tmp_path, capsys, name
):
    trainer_class, config_class = KINDS[name]
    rows = [
        {**record, "chosen": record["completion"], "rejected": "no", "label": index % 2 == 0}
        for index, record in enumerate(color_records)
    ]
    columns = {"dpo": ["prompt", "chosen", "rejected"], "kto": ["prompt", "completion", "label"]}
    base = copy.deepcopy(word_llama)
    model = wrapped(word_llama, modules_to_save=["lm_head"])
    settings = {**SETTINGS, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_class(
        model,
        args=config_class(str(tmp_path / "run"), **settings),
        train_dataset=Dataset.from_list(rows).select_columns(
            columns.get(name, ["prompt", "completion"])
        ),
        processing_class=word_tokenizer,
    )
    trainer.train()
    model.eval()
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
    # The model inside the trainer counts its parameters as the wrapper does.
    capsys.readouterr()
    trainer.model.print_trainable_parameters()
    inner = capsys.readouterr().out
    model.print_trainable_parameters()
    assert inner == capsys.readouterr().out
    assert "trainable params" in inner
