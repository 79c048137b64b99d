"""A model class that no library knows: blocks are found by structure or by ``block_path``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from architectures import DIM, VOCAB
from block_outputs import outputs
from tiny_models import edit, parameters_of, tokens
from torch import nn

from reft import ReftConfig, ReftModel, get_reft_model


class Mixer(nn.Module):
    """A model with two equal lists of blocks whose output is a plain tensor."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(DIM, DIM)

        def forward(self, hidden):
            return hidden + torch.tanh(self.mix(hidden)).cumsum(1) / 9

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=DIM, num_hidden_layers=2)
        self.embed = nn.Embedding(VOCAB, DIM)
        self.lower = nn.ModuleList([self.Block(), self.Block()])
        self.upper = nn.ModuleList([self.Block(), self.Block()])

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for block in [*self.lower, *self.upper]:
            hidden = block(hidden)
        return hidden


@pytest.mark.parametrize("component", ["block_output", "module:mix"])
def test_a_model_that_nobody_knows(component, tmp_path):
    torch.manual_seed(0)
    base, ids = Mixer(), tokens(2, 6)
    settings = {"rank": 2, "positions": "l2", "layers": [1], "component": component}
    with pytest.raises(ValueError, match="lower \\(2\\), upper \\(2\\)"):
        get_reft_model(base, ReftConfig(**settings))
    model = get_reft_model(base, ReftConfig(**settings, block_path="upper"))
    module = base.upper[1] if component == "block_output" else base.upper[1].mix
    (edited,) = outputs(model, [module], {"input_ids": ids})
    (plain,) = outputs(model, [module], {"input_ids": ids}, again=[edited])
    rows = [4, 5, 10, 11]
    expected = edit(
        plain.reshape(-1, DIM)[rows], model.configs["default"], parameters_of(model), 0, 0
    )
    torch.testing.assert_close(edited.reshape(-1, DIM)[rows], expected.detach())
    assert torch.equal(edited[:, :4], plain[:, :4])
    model(ids).square().sum().backward()
    assert all(
        parameter.grad.abs().max() > 0 for parameter in model.reft.adapter("default").parameters()
    )
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        got = model(ids)
        again = ReftModel.from_pretrained(model.unload(), tmp_path)
        torch.testing.assert_close(again(ids), got)
