"""The wrapper as an object: counts, signature, attributes, modes, names."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny_models import DIM, LAYERS, llama, tokens
from transformers import LlamaConfig, LlamaForCausalLM

import reft
from reft import ReftConfig, get_reft_model


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 3, "positions": "f2+l2", **changes})


def test_the_meta_device_allocates_nothing():
    shape = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(shape)
    model = get_reft_model(base, ReftConfig(rank=8, positions="f7+l7"))
    trained, total = model.get_nb_trainable_parameters()
    assert trained == 80 * (2 * 8 * 8192 + 8)
    assert total > 70e9
    assert all(p.is_meta for p in model.parameters())
    assert all(b.is_meta for n, b in model.named_buffers() if ".reft." in n)


def test_counts_are_printed_as_peft_prints_them(capsys):
    model = get_reft_model(llama(), config())
    trained, total = model.get_nb_trainable_parameters()
    assert trained == LAYERS * (2 * 3 * DIM + 3)
    assert total == trained + sum(p.numel() for p in llama().parameters())
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {trained:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trained / total:.4f}\n"
    )


def test_the_signature_is_that_of_the_base_with_five_keywords():
    base = llama()
    base_names = list(inspect.signature(base.forward).parameters)
    model = get_reft_model(base, config())
    parameters = inspect.signature(model.forward).parameters
    added = ["prompt_lengths", "adapter_names", "adapter_scales", "edit_positions", "subspaces"]
    assert list(parameters) == [*base_names[:-1], *added, base_names[-1]]
    assert parameters["prompt_lengths"].default is None
    assert list(inspect.signature(base.forward).parameters) == base_names


def test_attributes_of_the_base_are_those_of_the_wrapper():
    base = llama()
    model = get_reft_model(base, config())
    assert model.config is base.config
    assert model.get_input_embeddings() is base.model.embed_tokens
    assert model._no_split_modules == base._no_split_modules
    assert model.device == base.device
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_train_and_eval_reach_every_module():
    model = get_reft_model(llama(), config())
    assert not any(module.training for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())


def test_merging_is_refused():
    model = get_reft_model(llama(), config())
    for method in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match="edits hidden vectors at chosen tokens"):
            method()


def test_the_identity_initialisation_changes_nothing_and_can_learn():
    base = llama()
    ids = tokens(2, 8)
    with torch.no_grad():
        expected = base(ids).logits
    model = get_reft_model(base, config(init="identity")).train()
    out = model(ids).logits
    assert torch.equal(out, expected)
    out.pow(2).sum().backward()
    assert model.base_model.reft.adapter("default").weight.grad.abs().max() > 0


def test_public_names_load_on_demand():
    assert reft.get_reft_model is get_reft_model
    assert set(reft.__all__) <= set(dir(reft))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = reft.nonsense
