"""Tied modules in ``modules_to_save``: all of them are trained as one parameter, or none is."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from tiny_models import DIM, LAYERS, VOCAB, bert, gpt2, llama, tokens
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertForMaskedLM, T5Config, T5ForConditionalGeneration

from reft import ReftConfig, ReftModel, get_reft_model
from reft.io.adapter_files import read_adapter, write_adapter

IDS = tokens(2, 7)


def config(*modules, **changes) -> ReftConfig:
    return ReftConfig(**{"rank": 2, "positions": "f2", "modules_to_save": modules, **changes})


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_heads": 2}
    shape = T5Config(**sizes, num_layers=2, decoder_start_token_id=0, dropout_rate=0.0)
    return T5ForConditionalGeneration(shape).eval()


def masked() -> nn.Module:
    return BertForMaskedLM(bert().config).eval()


def logits(model, ids=IDS):
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def tied_weights(base):
    return base.model.embed_tokens.weight, base.lm_head.weight


def step(model, ids=IDS) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    out = model(input_ids=ids, prompt_lengths=[3] * len(ids)).logits
    cross_entropy(out.flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize(
    "modules", [["embed_tokens"], ["lm_head"], ["model.embed_tokens", "lm_head"]], ids=str
)
def test_both_ends_are_one_matrix_in_every_state(modules, tmp_path):
    base = tied()
    originals, before = base.model.embed_tokens, logits(base)
    model = get_reft_model(base, config(*modules))
    [first, last] = tied_weights(base)
    assert first is last
    assert first is not originals.weight
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    of_base = {name for name in trained if ".reft." not in name}
    assert of_base == {"base_model.model.embed_tokens.weight"}
    start = first.detach().clone()
    step(model)
    [first, last] = tied_weights(base)
    assert first is last
    assert not torch.equal(first, start)
    assert torch.equal(originals.weight, start)
    after = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
        assert tied_weights(base)[0] is tied_weights(base)[1] is originals.weight
    model.save_pretrained(tmp_path / "read")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    for folder in ("read", "given"):
        stored, tensors = read_adapter(tmp_path / folder)
        saved = [name for name in tensors if "heads" in name]
        assert saved == ["heads.model.embed_tokens.weight"]
        again = ReftModel.from_pretrained(tied(), tmp_path / folder)
        assert tied_weights(again.base_model)[0] is tied_weights(again.base_model)[1]
        torch.testing.assert_close(logits(again), after, rtol=1e-5, atol=1e-5)
        assert again.configs["default"] == stored == model.configs["default"]
    counted = LAYERS * (2 * 2 * DIM + 2) + VOCAB * DIM
    assert model.get_nb_trainable_parameters()[0] == counted
    assert f"{counted:,d} trained parameters" in (tmp_path / "read" / "README.md").read_text()
    back = model.unload()
    assert torch.equal(logits(back), before)
    assert tied_weights(back)[0] is tied_weights(back)[1] is originals.weight


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"]], ids=str)
def test_the_gradient_is_that_of_the_tied_base(modules):
    plain = tied()
    cross_entropy(plain(IDS).logits.flatten(0, 1), IDS.flatten()).backward()
    base = tied()
    model = get_reft_model(base, config(*modules, init="identity")).train()
    out = model(IDS, prompt_lengths=[3, 3]).logits
    cross_entropy(out.flatten(0, 1), IDS.flatten()).backward()
    expected = plain.lm_head.weight.grad
    torch.testing.assert_close(base.lm_head.weight.grad, expected, rtol=1e-4, atol=1e-6)
    assert base.model.embed_tokens.weight.grad is base.lm_head.weight.grad


def test_each_adapter_has_its_own_pair():
    base = tied()
    before = logits(base)
    model = get_reft_model(base, config("lm_head"), "first")
    step(model)
    first = logits(model)
    model.add_adapter("second", config("embed_tokens"))
    model.add_adapter("without", config())
    model.set_adapter("second")
    step(model)
    second = logits(model)
    assert (first - second).abs().max() > 1e-3
    model.set_adapter("without")
    assert torch.equal(tied_weights(base)[0], tied().lm_head.weight)
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    model.delete_adapter("first")
    assert torch.equal(logits(model), second)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert tied_weights(copied.base_model)[0] is tied_weights(copied.base_model)[1]
        assert torch.equal(logits(copied), second)
        assert torch.equal(logits(copied.unload()), before)


def test_a_training_state_is_restored(tmp_path):
    model = get_reft_model(tied(), config("embed_tokens"))
    step(model)
    model.save_pretrained(tmp_path, training_state=True)
    expected = logits(model)
    step(model)
    model.restore(tmp_path)
    assert torch.equal(logits(model), expected)
    assert tied_weights(model.base_model)[0] is tied_weights(model.base_model)[1]


def test_added_modules_are_logged_and_stored(caplog):
    with caplog.at_level(logging.WARNING, "reft"):
        model = get_reft_model(tied(), config("embed_tokens"))
    assert "lm_head is trained too, because a parameter is shared" in caplog.text
    assert model.configs["default"].modules_to_save == ("embed_tokens", "lm_head")
    caplog.clear()
    untied = get_reft_model(llama(tie_word_embeddings=False), config("embed_tokens"))
    assert untied.configs["default"].modules_to_save == ("embed_tokens",)
    assert not caplog.text


@pytest.mark.parametrize(
    ("build", "modules", "expected"),
    [
        (gpt2, ["wte"], {"transformer.wte", "lm_head"}),
        (t5, ["shared"], {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}),
        (
            t5,
            ["decoder.embed_tokens"],
            {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"},
        ),
        (masked, ["cls"], {"cls", "bert.embeddings.word_embeddings"}),
        (
            masked,
            ["word_embeddings", "cls.predictions"],
            {"cls.predictions", "bert.embeddings.word_embeddings"},
        ),
    ],
    ids=["gpt2", "t5", "t5-decoder", "bert", "bert-both"],
)
def test_all_ties_of_other_models(build, modules, expected, tmp_path):
    base = build()
    before, block_path = logits(base), "decoder.block" if build is t5 else None
    shapes = _groups(base)
    model = get_reft_model(base, config(*modules, block_path=block_path))
    assert {*model.reft.modules_to_save.paths["default"]} == expected
    assert _groups(base) == shapes
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    changed = logits(model)
    assert (changed - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = ReftModel.from_pretrained(build(), tmp_path)
    assert _groups(again.base_model) == shapes
    torch.testing.assert_close(logits(again), changed, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model.unload()), before)
    assert _groups(base) == shapes


def _groups(base) -> set[frozenset[str]]:
    """The names of each parameter of a base, without adapters."""
    names: dict[int, set[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if not name.startswith("reft."):
            names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values()}


@pytest.mark.parametrize("modules", [["word_embeddings"], ["decoder"]], ids=str)
def test_modules_that_cannot_stay_tied_are_refused(modules):
    """The bias of the output belongs to a module with further submodules."""
    base = masked()
    before = dict(base.named_modules())
    with pytest.raises(ValueError, match=r"would untie .*Name cls\.predictions too, or untie them"):
        get_reft_model(base, config(*modules))
    assert dict(base.named_modules()) == before


def test_a_module_at_two_paths_is_copied_once():
    base = llama(tie_word_embeddings=False)
    base.model.norm_again = base.model.norm
    model = get_reft_model(base, config("model.norm_again"))
    assert base.model.norm_again is base.model.norm
    assert base.model.norm.weight.requires_grad
    with model.disable_adapter():
        assert base.model.norm_again is base.model.norm
    assert model.unload().model.norm_again is base.model.norm


def test_an_adapter_of_an_untied_base_on_a_tied_one(tmp_path):
    """An adapter that names one of the two modules was trained on an untied base, and fits it."""
    untied = llama(tie_word_embeddings=False)
    model = get_reft_model(untied, config("embed_tokens"))
    model.save_pretrained(tmp_path / "untied")
    base = tied()
    with pytest.raises(ValueError, match=r"would untie model\.embed_tokens\.weight.*lm_head too"):
        ReftModel.from_pretrained(base, tmp_path / "untied")
    assert not hasattr(base, "reft")
    assert tied_weights(base)[0] is tied_weights(base)[1]
    base.config.tie_word_embeddings = False
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    ReftModel.from_pretrained(base, tmp_path / "untied")
    get_reft_model(tied(), config("embed_tokens")).save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight.*base that it was trained on"):
        ReftModel.from_pretrained(llama(tie_word_embeddings=False), tmp_path / "tied")


@pytest.mark.parametrize("equal", [True, False])
def test_a_file_that_holds_both_tied_weights(equal, tmp_path):
    model = get_reft_model(tied(), config("lm_head"))
    step(model)
    model.save_pretrained(tmp_path)
    stored, tensors = read_adapter(tmp_path)
    first = tensors["heads.model.embed_tokens.weight"]
    tensors["heads.lm_head.weight"] = first if equal else first + 1
    write_adapter(tmp_path, stored, tensors)
    if equal:
        again = ReftModel.from_pretrained(tied(), tmp_path)
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
        return
    with pytest.raises(ValueError, match=r"lm_head\.weight must be equal, they are one parameter"):
        ReftModel.from_pretrained(tied(), tmp_path)
