"""``torch.compile(fullgraph=True)`` of a wrapped model: plan and edits lie in one graph."""

from __future__ import annotations

import pytest
import torch
from architectures import build, call_of, wrapped
from tiny_models import tokens

from reft import ReftConfig, get_reft_model

CASES = [
    ("llama", "mlp_output"),
    ("gemma2", "attention_output"),
    ("gpt2", "block_output"),
    ("modernbert", "mlp_output"),
    ("t5-encoder", "block_output"),
]


def loss_and_gradients(model, run, call):
    model.zero_grad()
    loss = run(**call)[0].float().square().mean()
    loss.backward()
    adapter = model.get_base_model().reft.adapter("default")
    return loss, {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}


def compare(model, *calls):
    """Compare eager and compiled training on inputs of different shapes."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for call in calls:
        loss, expected = loss_and_gradients(model, model, call)
        got_loss, got = loss_and_gradients(model, compiled, call)
        torch.testing.assert_close(got_loss, loss)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


NO_CACHE = {"use_cache": False}


@pytest.mark.parametrize(("name", "component"), CASES)
def test_architectures_and_components(name, component):
    model = wrapped(name, component, layers=[0, 2]).train()
    # Without a cache: torch 2.11 cannot trace its creation in T5.
    compare(model, {**call_of(name, tokens(2, 7)), **({} if "bert" in name else NO_CACHE)})


GIVEN = {
    "numbers": torch.tensor([[0, 3, -1], [5, -1, -1]]),
    "a mask": torch.arange(14).reshape(2, 7) % 3 == 0,
}


@pytest.mark.parametrize("form", GIVEN)
def test_positions_of_each_call(form):
    model = wrapped("llama", "block_output").train()
    compare(model, {"input_ids": tokens(2, 7), "edit_positions": GIVEN[form]})


@pytest.mark.parametrize("positions", ["prompt+g2", "f2+l2"])
def test_labels_and_masks(positions):
    model = wrapped("llama", "block_output", positions=positions).train()
    calls = []
    for width in (7, 9):
        ids = tokens(2, width)
        labels = ids.masked_fill(torch.arange(width) < 4, -100)
        mask = torch.ones_like(ids)
        mask[1, -2:] = 0
        calls.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    compare(model, *calls)


def test_several_adapters():
    torch.manual_seed(3)
    model = get_reft_model(build("llama"), ReftConfig(rank=2, positions="f2+l1"))
    model.add_adapter("other", ReftConfig(rank=1, positions="l2"))
    names = ["other", "default", "__base__"]
    compare(model, {"input_ids": tokens(3, 6), "adapter_names": names})


def test_a_disabled_adapter():
    model = wrapped("llama", "block_output").train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = tokens(2, 7)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
