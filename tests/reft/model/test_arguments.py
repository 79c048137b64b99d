"""Wrong arguments of ``get_reft_model`` are refused before anything is changed."""

from __future__ import annotations

import pytest
from tiny_models import DIM, llama
from torch import nn

from reft import ReftConfig, get_reft_model


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 3, "positions": "f2+l2", **changes})


def test_a_model_that_is_wrapped_already():
    model = get_reft_model(llama(), config())
    for wrapped in (model, model.base_model):
        with pytest.raises(ValueError, match="add_adapter"):
            get_reft_model(wrapped, config())


def test_a_base_that_is_no_model():
    with pytest.raises(TypeError, match="a module with a config"):
        get_reft_model(nn.Linear(3, 3), config())
    with pytest.raises(TypeError, match="got str"):
        get_reft_model("gpt2", config())


@pytest.mark.parametrize("changes", [{"layers": [7]}, {"rank": DIM + 1}, {"init": "identity"}])
def test_a_configuration_that_does_not_fit_leaves_nothing(changes):
    base = llama()
    wrong = config(intervention="consreft", **changes)
    with pytest.raises(ValueError, match="ReftConfig"):
        get_reft_model(base, wrong)
    assert not hasattr(base, "reft")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert all(p.requires_grad for p in base.parameters())
