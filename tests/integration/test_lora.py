"""PEFT's LoRA under the edits: both are trained, each has its own switch, both are saved."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from lora_models import (
    IDS,
    LABELS,
    ORDERS,
    SPANS,
    config,
    kinds,
    logits,
    logits_of,
    trained,
    with_lora,
)
from tiny_models import blocks_of, llama, parameters_of, plain_edits

from reft import ReftModel, get_reft_model
from reft.io.adapter_files import read_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")


@pytest.mark.parametrize(
    ("order", "base"),
    [*((order, "llama") for order in ORDERS), ("task", "gpt2"), ("wrapper", "bert")],
)
def test_gradients_of_both_equal_the_plain_ones(order, base):
    model = get_reft_model(with_lora(order, base), config(layers=[0, 2])).train()
    labels = torch.tensor([0, 1, 2]) if base == "bert" else LABELS
    spans = [(0, 9)] * 3 if base == "bert" else SPANS
    model(input_ids=IDS, labels=labels).loss.backward()
    adapter = model.base_model.reft.adapter("default")
    got = {name: parameter.grad.clone() for name, parameter in trained(model).items()}
    assert kinds(model) == {"lora", "reft"}
    assert all("lora_" in name or ".reft." in name for name in got)
    model.zero_grad()
    values = parameters_of(model)
    with (
        model.disable_adapter(),
        plain_edits(blocks_of(model.get_base_model()), model.configs["default"], values, spans),
    ):
        model(input_ids=IDS, labels=labels).loss.backward()
    expected = {
        name: parameter.grad for name, parameter in trained(model).items() if "lora_" in name
    }
    path = next(name for name in got if name.endswith(".bias")).removesuffix("bias")
    expected |= {path + name: values[name].grad for name, _ in adapter.named_parameters()}
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_each_is_switched_by_its_own_switch(order):
    plain = logits(llama())
    base = with_lora(order)
    with_lora_only = logits(base)
    model = get_reft_model(base, config())
    both = logits(model)
    alone = get_reft_model(llama(), config())
    alone.reft.adapter("default").load(model.reft.adapter("default").export_state_dict())
    without_lora = logits(alone)
    assert len({x.sum().item() for x in (plain, with_lora_only, both, without_lora)}) == 4

    def lora_off(forward):
        if order != "transformers":
            with base.disable_adapter():
                return forward()
        base.disable_adapters()
        outputs = forward()
        base.enable_adapters()
        return outputs

    torch.testing.assert_close(lora_off(lambda: logits(model)), without_lora, rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        assert torch.equal(logits(model), with_lora_only)
        assert torch.equal(lora_off(lambda: logits(model)), plain)
    assert torch.equal(logits(model), both)
    assert kinds(model) == {"lora", "reft"}


@pytest.mark.parametrize("order", ORDERS)
def test_this_librarys_arguments_pass_peft(order):
    base = with_lora(order)
    plain = logits(base)
    model = get_reft_model(base, config(positions="l1"))
    model.add_adapter("other", config(positions="l1"))
    expected = logits(model, prompt_lengths=[4, 5, 6])
    assert not torch.equal(expected, logits(model))
    for called in (base, model.get_base_model()):
        assert torch.equal(logits(called, prompt_lengths=[4, 5, 6]), expected)
    mixed = logits(model, prompt_lengths=[4, 5, 6], adapter_names=["default", "__base__", "other"])
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed[1], plain[1], rtol=1e-5, atol=1e-6)
    assert (mixed[2] - expected[2]).abs().max() > 1e-3
    with torch.no_grad():
        by_place = model(IDS, torch.ones_like(IDS), prompt_lengths=[4, 5, 6]).logits
    assert torch.equal(by_place, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_generate_edits_the_prompt(order):
    base = with_lora(order)
    model = get_reft_model(base, config())
    expected = IDS
    for _ in range(5):
        step = logits_of(model, expected, prompt_lengths=[9] * 3)
        expected = torch.cat([expected, step[:, -1:].argmax(-1)], 1)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for called in (model, base):
        assert torch.equal(called.generate(input_ids=IDS, **settings), expected)
    named = model.generate(IDS, adapter_names=["default", "__base__", "default"], **settings)
    assert torch.equal(named[[0, 2]], expected[[0, 2]])
    with model.disable_adapter():
        off = model.generate(IDS, **settings)
    assert torch.equal(named[1], off[1])
    assert not torch.equal(off, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_unload_gives_the_model_with_lora_back(order):
    base = with_lora(order)
    before, parameters = logits(base), {n: p.requires_grad for n, p in base.named_parameters()}
    model = get_reft_model(base, config())
    logits(model)
    assert model.unload() is base
    assert not hasattr(base, "reft")
    assert {n: p.requires_grad for n, p in base.named_parameters()} == parameters
    for module in base.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called
    assert torch.equal(logits(base), before)


def test_lora_that_was_loaded_frozen_stays_frozen(tmp_path):
    with_lora("task").save_pretrained(tmp_path)
    base = peft.PeftModel.from_pretrained(llama(), tmp_path)
    model = get_reft_model(base, config())
    assert kinds(model) == {"reft"}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".reft." in name), name


def test_lora_that_is_trained_can_be_frozen():
    base = with_lora("task")
    if "inference_mode" not in inspect.signature(base.set_adapter).parameters:
        pytest.skip("this release of PEFT has no such switch")
    base.set_adapter("default", inference_mode=True)
    assert kinds(get_reft_model(base, config())) == {"reft"}


def test_what_lora_was_merged_into_is_frozen():
    merged = with_lora("task").merge_and_unload().requires_grad_(True)
    merged.peft_config = {"default": peft.LoraConfig()}  # PEFT leaves this attribute behind
    model = get_reft_model(merged, config())
    assert kinds(model) == {"reft"}
    assert all(parameter.requires_grad for parameter in model.unload().parameters())


@pytest.mark.parametrize("order", ORDERS)
def test_an_adapter_holds_no_lora_and_fits_the_merged_model(order, tmp_path):
    model = get_reft_model(with_lora(order), config())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert set(read_adapter(tmp_path)[1]) == {"rotation", "weight", "bias"}
    again = ReftModel.from_pretrained(with_lora(order), tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-6)
    if order != "transformers":
        merged = ReftModel.from_pretrained(again.unload().merge_and_unload(), tmp_path)
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_without_peft_nothing_asks_for_it(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)
    model = get_reft_model(llama(), config())
    assert kinds(model) == {"reft"}
    assert all(parameter.requires_grad for parameter in model.unload().parameters())


# ------------------------------------------------------------------ modules_to_save


def test_a_head_that_peft_trains_stays_pefts(tmp_path):
    base = with_lora("wrapper", "bert", modules_to_save=["classifier"])
    model = get_reft_model(base, config(positions="prompt", task_type="SEQ_CLS"))
    model(input_ids=IDS, labels=torch.tensor([0, 1, 2])).loss.backward()
    heads = [
        name
        for name, parameter in model.named_parameters()
        if "classifier" in name and parameter.grad is not None
    ]
    assert [name.rpartition(".")[2] for name in heads] == ["weight", "bias"]
    model.save_pretrained(tmp_path)
    assert not [name for name in read_adapter(tmp_path)[1] if "classifier" in name]
    with pytest.raises(ValueError, match=r"modules_to_save.*'classifier'"):
        get_reft_model(model.unload(), config(modules_to_save=["classifier"]))


# ------------------------------------------------------------------ LoRA added after the edits


def test_lora_added_later_freezes_the_edits_until_they_are_set():
    model = get_reft_model(llama(), config())
    with_lora("transformers", model=model.base_model)
    assert kinds(model) == {"lora"}
    model.set_adapter("default")
    assert kinds(model) == {"lora", "reft"}
    both = logits(model)
    with model.disable_adapter():
        assert not torch.equal(logits(model), both)


def test_lora_second_is_refused():
    model = get_reft_model(llama(), config())
    expected = logits(model)
    with pytest.raises(ValueError, match=r"get_reft_model\(peft\.get_peft_model\(base"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(logits(model), expected)


def test_virtual_tokens_are_refused():
    base = peft.get_peft_model(
        llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(ValueError, match=r"virtual tokens.*'default'"):
        get_reft_model(base, config())
