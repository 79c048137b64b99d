"""The token that training teaches as the end of an answer is one at which generation stops, in this
process and after the adapter was loaded."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, TrainingArguments

from reft import ReftConfig, ReftDataCollator, ReftModel, ReftTrainer, get_reft_model
from reft.io.adapter_files import METADATA_KEY as CONFIG_KEY
from reft.io.adapter_files import WEIGHTS_FILE


def trained(base, tokenizer, records, folder, steps=1, **collator):
    model = get_reft_model(base, ReftConfig(rank=2, positions="f2+l2", init="identity"))
    arguments = TrainingArguments(
        str(folder / "run"), max_steps=steps, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", learning_rate=0.0,
    )  # fmt: skip
    ReftTrainer(model, arguments, ReftDataCollator(tokenizer, **collator), records).train()
    return model.eval()


@pytest.fixture
def question(word_tokenizer):
    """A tokenizer whose end token is an ordinary one, which the model's configuration does not
    name."""
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.eos_token = "?"
    return tokenizer


def steps_of(model, ids, **more):
    """How many tokens are generated where the model always writes the token "?"."""
    return model.generate(ids, max_new_tokens=5, do_sample=False, **more).shape[1] - ids.shape[1]


@pytest.fixture
def always_asks(word_llama, question):
    """A model that answers every prompt with question marks."""
    with torch.no_grad():
        word_llama.lm_head.weight.zero_()
        word_llama.model.norm.weight.fill_(1.0)
        number = question.eos_token_id

        def bias(module, args, output):
            output[..., number] += 1e3
            return output

        word_llama.lm_head.register_forward_hook(bias)
    return word_llama


@pytest.mark.parametrize(
    ("configured", "append", "kept"),
    [
        ("<eos>", True, True),
        ("?", True, False),
        (["<eos>", "?"], True, False),
        (["<eos>", "red"], True, True),
        (None, True, True),
        ("<eos>", False, False),
    ],
)
def test_what_the_base_does_not_know_is_kept_with_the_adapter(
    always_asks, question, color_records, tmp_path, configured, append, kept
):
    base, number = always_asks, question.eos_token_id
    ends = question.convert_tokens_to_ids(configured) if configured else None
    base.generation_config.eos_token_id = ends
    model = trained(base, question, color_records, tmp_path, append_eos=append)
    assert base.generation_config.eos_token_id == ends
    assert model.reft.ends == ({"default": (number,)} if kept else {})
    stops = kept or (configured is not None and "?" in configured)
    ids = torch.tensor([[5, 6, 7]])
    assert steps_of(model, ids) == (1 if stops else 5)
    model.save_pretrained(tmp_path / "adapter")
    again = ReftModel.from_pretrained(model.unload(), tmp_path / "adapter")
    assert again.reft.ends == ({"default": (number,)} if kept else {})
    assert steps_of(again, ids) == (1 if stops else 5)


def test_who_stops_there(always_asks, question, color_records, tmp_path):
    always_asks.generation_config.eos_token_id = 2
    model = trained(always_asks, question, color_records, tmp_path)
    ids, number = torch.tensor([[5, 6, 7]]), question.eos_token_id
    assert steps_of(model, ids) == 1
    # What a call says of ends goes before; what its configuration says is joined.
    assert steps_of(model, ids, eos_token_id=2) == 5
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=2)
    assert model.generate(ids, settings).shape[1] == 4
    assert model.generate(ids, generation_config=settings).shape[1] == 4
    assert settings.eos_token_id == 2
    with model.disable_adapter():
        assert steps_of(model, ids) == 5
    model.add_adapter("other", ReftConfig(rank=1, positions="l1"))
    assert steps_of(model, ids, adapter_names=["other"]) == 5
    assert steps_of(model, ids, adapter_names=["default"]) == 1
    model.delete_adapter("default")
    assert steps_of(model, ids) == 5 and number not in [2]


def test_checkpoints_hold_it_and_a_resumed_run_has_it(
    always_asks, question, color_records, tmp_path
):
    always_asks.generation_config.eos_token_id = 2
    model = trained(always_asks, question, color_records, tmp_path)
    model.save_pretrained(tmp_path / "state", training_state=True)
    again = ReftModel.from_pretrained(model.unload(), tmp_path / "state", is_trainable=True)
    again.save_pretrained(tmp_path / "twice")
    base = again.unload()
    assert steps_of(ReftModel.from_pretrained(base, tmp_path / "twice"), torch.tensor([[5]])) == 1


@pytest.mark.parametrize("damage", ["no list", [1.5], [True], [-1], ["?"], {"a": 1}])
def test_something_else_in_its_place(word_llama, tmp_path, damage):
    model = get_reft_model(word_llama, ReftConfig(rank=2, positions="f2"))
    model.save_pretrained(tmp_path)
    config = model.configs["default"].to_json()
    base = model.unload()
    file = tmp_path / WEIGHTS_FILE
    text = damage if isinstance(damage, str) else json.dumps(damage)
    save_file(load_file(file), file, metadata={CONFIG_KEY: config, "end_tokens": text})
    with pytest.raises(ValueError, match="end_tokens must be a list"):
        ReftModel.from_pretrained(base, tmp_path)
    assert not hasattr(base, "reft")
