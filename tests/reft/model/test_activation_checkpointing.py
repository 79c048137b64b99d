"""Activation checkpointing of transformers: gradients are the same with and without it.

Up to 5.22 a block is recomputed with its hooks, from 5.23 on without them but with those of its
submodules.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from architectures import build, call_of, wrapped
from tiny_models import tokens
from torch.utils.checkpoint import checkpoint

from reft import ReftConfig, get_reft_model
from reft.config import COMPONENTS
from reft.model import activation_checkpointing as checkpointing

#: Architecture -> components edited under checkpointing that is not reentrant.
NAMES = {
    "llama": COMPONENTS,
    "gpt2": COMPONENTS,
    "opt": ["mlp_output"],
    "gpt-neox": ["attention_output"],
    "mixtral": ["mlp_output"],
    "bert": ["block_output", "mlp_output"],
    "deberta-v2": ["attention_output"],
    "t5-encoder": ["attention_output"],
    "t5-decoder": COMPONENTS,
}
#: And under reentrant checkpointing.
REENTRANT = {
    "llama": ["block_output"],
    "gpt2": COMPONENTS,
    "mixtral": ["attention_output"],
    "bert": ["attention_output"],
    "t5-decoder": ["block_output"],
}
CASES = [
    *((name, component, False) for name, listed in NAMES.items() for component in listed),
    *((name, component, True) for name, listed in REENTRANT.items() for component in listed),
]


def loss_of(model, call):
    out = model(**call)[0].float()
    torch.manual_seed(7)
    return (out * torch.randn_like(out)).mean()


def gradients(model, *calls):
    """Gradients of the sum of all losses: every forward comes before the single backward."""
    model.zero_grad()
    sum(loss_of(model, call) for call in calls).backward()
    parameters = model.reft.adapter("default").named_parameters()
    return {name: parameter.grad.clone() for name, parameter in parameters}


def assert_close(actual, expected):
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[key], gradient, rtol=1e-4, atol=1e-6)


def start(name, component, reentrant):
    model = wrapped(name, component).train()
    ids = tokens(2, 7)
    calls = [call_of(name, ids), call_of(name, tokens(3, 5, seed=9))]
    return model, calls, {"use_reentrant": reentrant}


@pytest.mark.parametrize(("name", "component", "reentrant"), CASES)
def test_the_same_gradients(name, component, reentrant):
    model, calls, how = start(name, component, reentrant)
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
        recomputed = gradients(model, calls[0])
    assert len(runs) >= len(model.reft.blocks.layers)
    assert_close(recomputed, expected)
    assert_close(gradients(model, *calls), both)


def test_a_base_with_checkpointing_enabled_before_wrapping():
    """It is enabled on the base itself; unload() restores the base's own function."""
    base = build("gpt2")
    base.gradient_checkpointing_enable({"use_reentrant": False})
    before = [block._gradient_checkpointing_func for block in base.transformer.h]
    torch.manual_seed(3)
    model = get_reft_model(base, ReftConfig(rank=2, positions="f2+l1", component="mlp_output"))
    call = call_of("gpt2", tokens(2, 7))
    recomputed = gradients(model.train(), call)
    assert_close(recomputed, gradients(wrapped("gpt2", "mlp_output").train(), call))
    model.unload()
    assert [block._gradient_checkpointing_func for block in base.transformer.h] == before


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_a_block_without_its_plan_is_an_error(reentrant):
    """The block is checkpointed by other code than transformers' own."""
    model = wrapped("gpt2", "mlp_output").train()
    model.enable_input_require_grads()
    for block in model.base_model.transformer.h:
        real = block.forward
        block.forward = lambda *args, real=real, **kwargs: checkpoint(
            partial(real, **kwargs), *args, use_reentrant=reentrant
        )
    with pytest.raises(Exception, match="runs again in backward"):
        gradients(model, call_of("gpt2", tokens(2, 7)))
