"""Resizing or replacing the embeddings of a wrapped model."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from tiny_models import DIM, VOCAB, bert, llama, tokens
from torch import nn

from reft import ReftConfig, get_reft_model
from reft.model.vocabulary import METHODS

IDS = tokens(2, 6)
MORE = torch.tensor([[1, VOCAB, 5, VOCAB + 1, 7]])


def config(*modules, **changes) -> ReftConfig:
    return ReftConfig(**{"rank": 2, "positions": "f2", "modules_to_save": modules, **changes})


def replaced_methods(base) -> list[str]:
    return [name for module in base.modules() for name in METHODS if name in module.__dict__]


CHANGES = {
    "resize": lambda model: model.resize_token_embeddings(VOCAB + 2, mean_resizing=False),
    "resize by keyword": lambda model: model.resize_token_embeddings(new_num_tokens=VOCAB - 3),
    "pad": lambda model: model.resize_token_embeddings(None, 32),
    "pad by keyword": lambda model: model.resize_token_embeddings(VOCAB, pad_to_multiple_of=64),
    "the stack": lambda model: model.model.resize_token_embeddings(VOCAB + 2),
    "input": lambda model: model.set_input_embeddings(nn.Embedding(VOCAB, DIM)),
    "output": lambda model: model.set_output_embeddings(nn.Linear(DIM, VOCAB, bias=False)),
    "output by keyword": lambda model: model.set_output_embeddings(
        new_embeddings=nn.Linear(DIM, VOCAB + 1, bias=False)
    ),
}


#: (change, object that it is called on, tied embeddings, module that the adapter trains)
CASES = [
    *((change, "wrapper", True, "lm_head") for change in CHANGES),
    *((change, "base", False, "embed_tokens") for change in CHANGES),
    *(("resize", way, False, "lm_head") for way in ("wrapper", "base", "disabled")),
    ("input", "disabled", False, "lm_head"),
    ("output", "disabled", True, "lm_head"),
]


@pytest.mark.parametrize(("change", "way", "tied", "module"), CASES)
def test_it_is_refused_before_anything_changes(change, way, tied, module):
    base = llama(tie_word_embeddings=tied)
    before = base(IDS).logits
    model = get_reft_model(base, config(module))
    present = dict(base.named_modules()), base(IDS).logits
    with pytest.raises(
        ValueError, match=r"while adapters train .*'default' does.*unload\(\) first"
    ):
        if way == "disabled":
            with model.disable_adapter():
                CHANGES[change](model)
        else:
            CHANGES[change](model if way == "wrapper" else base)
    assert dict(base.named_modules()) == present[0]
    assert torch.equal(base(IDS).logits, present[1])
    assert base.config.vocab_size == VOCAB
    assert torch.equal(model.unload()(IDS).logits, before)


@pytest.mark.parametrize("where", ["active", "stored"])
def test_any_adapter_with_copies_counts(where):
    base = llama(tie_word_embeddings=False)
    model = get_reft_model(base, config("lm_head"), "trains")
    model.add_adapter("plain", config())
    if where == "stored":
        model.set_adapter("plain")
    with pytest.raises(ValueError, match="'trains' does"):
        base.resize_token_embeddings(VOCAB + 2)
    model.delete_adapter("trains")
    assert not replaced_methods(base)
    base.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    with torch.no_grad():
        assert model(MORE).logits.shape[-1] == VOCAB + 2


def test_calls_that_change_nothing_are_allowed():
    base = llama(tie_word_embeddings=False)
    model = get_reft_model(base, config("embed_tokens", "lm_head"))
    assert model.resize_token_embeddings() is base.model.embed_tokens
    assert base.resize_token_embeddings(VOCAB) is base.model.embed_tokens
    assert model.resize_token_embeddings(VOCAB, pad_to_multiple_of=8) is base.model.embed_tokens
    base.set_input_embeddings(base.model.embed_tokens)
    base.set_output_embeddings(base.lm_head)
    model.tie_weights()
    assert {name for name, p in base.named_parameters() if p.requires_grad} >= {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize("tied", [True, False])
def test_without_copies_the_embeddings_are_resized(tied):
    plain, base = (llama(tie_word_embeddings=tied) for _ in range(2))
    model = get_reft_model(base, config())
    for resized in (plain, model):
        torch.manual_seed(5)
        resized.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    with torch.no_grad():
        expected = plain(MORE).logits
        assert model(MORE).logits.shape == expected.shape
        with model.disable_adapter():
            assert torch.equal(model(MORE).logits, expected)
        assert torch.equal(model.unload()(MORE).logits, expected)
    assert (base.lm_head.weight is base.model.embed_tokens.weight) is tied


def test_copies_of_other_modules_do_not_matter():
    base = bert()
    model = get_reft_model(base, config(task_type="SEQ_CLS"))
    model.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    assert base.bert.embeddings.word_embeddings.weight.shape[0] == VOCAB + 2
    assert base.classifier.weight.requires_grad
    with torch.no_grad():
        assert model(MORE).logits.shape == (1, 3)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_the_model_refuse_it_too(how):
    base = llama(tie_word_embeddings=True)
    twin = how(get_reft_model(base, config("lm_head")))
    with pytest.raises(ValueError, match="while adapters train"):
        twin.resize_token_embeddings(VOCAB + 2)
    freed = twin.unload()
    assert not replaced_methods(freed)
    freed.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    assert freed.lm_head.weight.shape[0] == VOCAB + 2
    assert base.lm_head.weight.shape[0] == VOCAB
    with pytest.raises(ValueError, match="while adapters train"):
        base.resize_token_embeddings(VOCAB + 2)


def test_through_pefts_wrapper():
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(llama(tie_word_embeddings=True), lora)
    model = get_reft_model(wrapped, config("embed_tokens"))
    for resized in (model, wrapped, model.get_base_model()):
        with pytest.raises(ValueError, match="while adapters train"):
            resized.resize_token_embeddings(VOCAB + 2)
    model.unload()
    assert not replaced_methods(wrapped)
