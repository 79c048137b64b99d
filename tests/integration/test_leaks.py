"""Hundreds of calls leave no hooks, objects or tensors behind, and an unused base is freed."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter

import pytest
import torch
from tiny_models import llama, tokens

from reft import ReftConfig, get_reft_model

TIMES = 600
CONFIG = ReftConfig(rank=1, positions="l1", layers=[0])
IDS = tokens(1, 3)

_HOOKS = [name for name in torch.nn.Module().__dict__ if "hooks" in name]


def facts(base):
    """Count hooks and attributes of all modules of a model."""
    counts = Counter()
    for path, module in base.named_modules():
        for name in _HOOKS:
            counts[name] += len(getattr(module, name) or ())
        counts.update(f"{path}.{name}" for name in vars(module))
        counts.update(f"{path}.{name}" for name in module._modules)
    return counts


def objects():
    gc.collect()
    return Counter(type(item).__name__ for item in gc.get_objects())


def assert_flat(action, times=TIMES):
    """Check that neither objects nor bytes of tensors grow over ``times`` calls."""
    for _ in range(20):  # fill the caches
        action()
    held, before = tensor_bytes(), objects()  # reading a storage makes an object
    for _ in range(times):
        action()
    more = objects() - before
    assert sum(more.values()) < times / 10, more.most_common(5)
    assert tensor_bytes() <= held


def tensor_bytes():
    """Sum the bytes of all tensors that Python can reach."""
    sizes = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):
            storage = item.untyped_storage()
            with contextlib.suppress(RuntimeError):  # a tensor of torch.compile without memory
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def tiny():
    return llama(
        num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip


def test_wrapping_and_unloading():
    base = tiny()
    before, weights = facts(base), {id(parameter) for parameter in base.parameters()}

    def action():
        get_reft_model(base, CONFIG).unload()

    assert_flat(action)
    assert facts(base) == before
    assert {id(parameter) for parameter in base.parameters()} == weights
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_adapters_that_come_and_go():
    model = get_reft_model(tiny(), CONFIG)
    before = facts(model.base_model)

    def action():
        model.add_adapter("more", CONFIG)
        model.delete_adapter("more")

    assert_flat(action)
    assert facts(model.base_model) == before


def test_adapters_of_the_pool(tmp_path):
    model = get_reft_model(tiny(), CONFIG).eval()
    model.save_pretrained(tmp_path)
    model.delete_adapter("default")
    before = facts(model.base_model)
    sizes = set()

    @torch.no_grad()
    def action():
        model.pool.add("one", tmp_path)
        model(IDS, adapter_names=["one"])
        sizes.add(model.pool.resident_nbytes)
        model.pool.remove("one")

    assert_flat(action, times=TIMES // 4)
    assert facts(model.base_model) == before
    assert len(sizes) == 1


def test_calls():
    """Forwards with and without gradients, generations, and calls that fail."""
    model = get_reft_model(tiny(), CONFIG)
    before = facts(model.base_model)

    def action():
        model(IDS, labels=IDS).loss.backward()
        model.zero_grad()
        with pytest.raises(ValueError, match="prompt_lengths"):
            model(IDS, prompt_lengths=[9, 9])
        with model.disable_adapter(), torch.no_grad():
            model(IDS)

    assert_flat(action, times=TIMES // 4)

    def generate():
        model.generate(IDS, max_new_tokens=1, do_sample=False)

    assert_flat(generate, times=TIMES // 4)
    assert facts(model.base_model) == before
    assert not model.reft.active_threads.threads
    assert not model.reft.active_threads.generations


@pytest.mark.parametrize("how", ["unloaded", "wrapped"])
def test_a_base_is_let_go(how):
    base = tiny()
    model = get_reft_model(base, CONFIG)
    model(IDS, labels=IDS).loss.backward()
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    seen = weakref.ref(base), weakref.ref(model.reft)
    if how == "unloaded":
        model.unload()
    del base, model
    gc.collect()
    assert [reference() for reference in seen] == [None, None]


def test_an_unloaded_base_does_not_hold_its_wrapper():
    base = tiny()
    model = get_reft_model(base, CONFIG)
    model(IDS, labels=IDS).loss.backward()
    seen = weakref.ref(model), weakref.ref(model.reft)
    model.unload()
    del model
    gc.collect()
    assert [reference() for reference in seen] == [None, None]


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_lengths": [9, 9]},
        {"adapter_names": ["nobody"] * 2},
        {"adapter_scales": [1.0, float("nan")]},
        {"input_ids": tokens(2, 5) + 1000},
        {"labels": tokens(2, 7)},
    ],
)
def test_a_call_that_fails_leaves_nothing(wrong):
    model = get_reft_model(llama(), ReftConfig(rank=2, positions="f2+l2"))
    ids = tokens(2, 5)
    with torch.no_grad():
        expected = model(ids).logits
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            model(**{"input_ids": ids, **wrong})
        call = model.reft.call
        assert (call.options, call.plan, call.generation) == (None, None, None)
        assert not model.reft.active_threads.threads
        assert torch.equal(model(ids).logits, expected)
