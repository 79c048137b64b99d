"""transformers' own activation checkpointing: the same gradients, whatever is run again.

Up to 5.22 a block is run again with its hooks, from 5.23 on without them but with those of its
parts.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from architectures import ARCHITECTURES, call_of, wrapped
from tiny_models import tokens
from torch.utils.checkpoint import checkpoint

from reft.model import activation_checkpointing as checkpointing

NAMES = [
    "llama",
    "gpt2",
    "opt",
    "gpt-neox",
    "mixtral",
    "bert",
    "deberta-v2",
    "t5-encoder",
    "t5-decoder",
]
COMPONENTS = ["block_output", "attention_output", "mlp_output"]
KINDS = {"reentrant": True, "not reentrant": False}


def loss_of(model, call):
    out = model(**call)[0].float()
    torch.manual_seed(7)
    return (out * torch.randn_like(out)).mean()


def gradients(model, *calls):
    """Of the sum of all losses: every forward before the one backward."""
    model.zero_grad()
    sum(loss_of(model, call) for call in calls).backward()
    return {
        name: one.grad.clone() for name, one in model.reft.adapter("default").named_parameters()
    }


def start(name, component, reentrant):
    model = wrapped(name, component).train()
    ids = tokens(2, 7)
    calls = [call_of(name, ids), call_of(name, tokens(3, 5, seed=9))]
    return model, calls, {"use_reentrant": reentrant}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_gradients(name, component, kind):
    model, calls, how = start(name, component, KINDS[kind])
    expected = gradients(model, calls[0])
    both = gradients(model, *calls)
    model.gradient_checkpointing_enable(how)
    runs = []
    real = checkpointing.KeepPlan.__call__

    def counted(self, *args, **kwargs):
        runs.append(1)
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing.KeepPlan, "__call__", counted)
        got = gradients(model, calls[0])
    assert len(runs) >= len(model.reft.blocks.blocks)
    for key, one in expected.items():
        torch.testing.assert_close(got[key], one, rtol=1e-4, atol=1e-6)
    for key, one in gradients(model, *calls).items():
        torch.testing.assert_close(one, both[key], rtol=1e-4, atol=1e-6)


def test_a_base_that_checkpoints_already(monkeypatch):
    """Switched on before wrapping, on the base itself; unload leaves the base's own function."""
    from architectures import build

    from reft import ReftConfig, get_reft_model

    base = build("gpt2")
    base.gradient_checkpointing_enable({"use_reentrant": False})
    before = [block._gradient_checkpointing_func for block in base.transformer.h]
    torch.manual_seed(3)
    model = get_reft_model(base, ReftConfig(rank=2, positions="f2+l1", component="mlp_output"))
    call = call_of("gpt2", tokens(2, 7))
    got = gradients(model.train(), call)
    expected = gradients(wrapped("gpt2", "mlp_output").train(), call)
    for key, one in expected.items():
        torch.testing.assert_close(got[key], one, rtol=1e-4, atol=1e-6)
    model.unload()
    assert [block._gradient_checkpointing_func for block in base.transformer.h] == before


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_part_that_is_run_again_without_its_plan_says_so(reentrant):
    """A block checkpointed by other code than transformers' switch."""
    model = wrapped("gpt2", "mlp_output").train()
    model.enable_input_require_grads()
    for block in model.base_model.transformer.h:
        real = block.forward
        block.forward = lambda *args, real=real, **kwargs: checkpoint(
            partial(real, **kwargs), *args, use_reentrant=reentrant
        )
    with pytest.raises(Exception, match="run again in backward"):
        gradients(model, call_of("gpt2", tokens(2, 7)))


def test_the_names_are_those_of_the_table():
    assert set(NAMES) <= ARCHITECTURES.keys()
