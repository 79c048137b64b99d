"""The wrapper as an object: counts, signature, copies, modes, names, refusals."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
from tiny_models import DIM, LAYERS, llama, tokens
from torch import nn
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


def test_the_signature_is_the_bases_with_five_more():
    base = llama()
    theirs = list(inspect.signature(base.forward).parameters)
    model = get_reft_model(base, config())
    mine = inspect.signature(model.forward).parameters
    ours = ["prompt_lengths", "adapter_names", "adapter_scales", "edit_positions", "subspaces"]
    assert list(mine) == [*theirs[:-1], *ours, theirs[-1]]
    assert mine["prompt_lengths"].default is None
    assert list(inspect.signature(base.forward).parameters) == theirs


def test_attributes_are_the_bases():
    base = llama()
    model = get_reft_model(base, config())
    assert model.config is base.config
    assert model.get_input_embeddings() is base.model.embed_tokens
    assert model._no_split_modules == base._no_split_modules
    assert model.device == base.device
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(how):
    model = get_reft_model(llama(), config())
    ids = tokens(2, 7)
    with torch.no_grad():
        expected = model(ids).logits
        twin = how(model)
        assert torch.equal(twin(ids).logits, expected)
        twin.base_model.reft.adapter("default").bias.add_(1.0)
        assert not torch.equal(twin(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)
        twin.unload()
        assert torch.equal(model(ids).logits, expected)


def test_modes_reach_everything():
    model = get_reft_model(llama(), config())
    assert not any(module.training for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())


def test_merging_is_refused():
    model = get_reft_model(llama(), config())
    for method in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match="edits hidden vectors at chosen tokens"):
            method()


class TestWrongModels:
    def test_twice(self):
        model = get_reft_model(llama(), config())
        for one in (model, model.base_model):
            with pytest.raises(ValueError, match="add_adapter"):
                get_reft_model(one, config())

    def test_no_configuration(self):
        with pytest.raises(TypeError, match="a module with a config"):
            get_reft_model(nn.Linear(3, 3), config())
        with pytest.raises(TypeError, match="got str"):
            get_reft_model("gpt2", config())

    @pytest.mark.parametrize("changes", [{"layers": [7]}, {"rank": DIM + 1}, {"init": "identity"}])
    def test_a_configuration_that_does_not_fit_leaves_nothing(self, changes):
        base = llama()
        wrong = config(intervention="consreft", **changes)
        with pytest.raises(ValueError, match="ReftConfig"):
            get_reft_model(base, wrong)
        assert not hasattr(base, "reft")
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
        assert all(p.requires_grad for p in base.parameters())


def test_an_identity_start_changes_nothing_and_can_learn():
    base = llama()
    ids = tokens(2, 8)
    with torch.no_grad():
        expected = base(ids).logits
    model = get_reft_model(base, config(init="identity")).train()
    out = model(ids).logits
    assert torch.equal(out, expected)
    out.pow(2).sum().backward()
    assert model.base_model.reft.adapter("default").weight.grad.abs().max() > 0


def test_importing_costs_nothing():
    code = "import sys, reft; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_load_on_demand():
    assert reft.get_reft_model is get_reft_model
    assert set(reft.__all__) <= set(dir(reft))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = reft.nonsense
