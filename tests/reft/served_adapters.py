"""Adapters of every kind in folders, a model that serves them, and each of them alone."""

from __future__ import annotations

import torch
from tiny_models import DIM, LAYERS, llama

from reft import ReftConfig, ReftModel
from reft.adapter.parameters import AdapterParameters
from reft.io.adapter_files import write_adapter

MIX = {
    "plain": {"rank": 3},
    "wide": {"rank": 8, "layers": [0, 2]},
    "untied": {"rank": 2, "tied": False},
    "apart": {"rank": 2, "tied": False, "untied_by": "position", "layers": [1]},
    "paper": {"rank": 2, "positions": "f3+l4", "short_prompts": "paper"},
    "early": {"rank": 1, "positions": "l2", "prompt_end": "second_to_last"},
    "steer": {"intervention": "lobireft", "rank": 1, "positions": "l1"},
    "const": {"intervention": "consreft", "rank": 2, "positions": "prompt"},
    "free": {"intervention": "noreft", "rank": 5, "positions": "f3", "layers": [2]},
    "gelu": {"rank": 4, "activation": "gelu"},
    "relu": {"intervention": "direft", "activation": "relu", "rank": 2, "positions": "f2"},
    "bf16": {"rank": 2, "positions": "l1", "dtype": "bfloat16"},
    "parts": {"rank": 4, "subspaces": {"one": [0, 1], "two": [2, 3]}},
    "mlp": {"rank": 2, "component": "mlp_output"},
}
#: Those without an activation, at the output of blocks.
LINEAR = [name for name in MIX if name not in ("gelu", "relu", "mlp")]
SETTINGS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def random_adapter(path, seed, *, dim=DIM, blocks=LAYERS, **changes):
    """Write an adapter whose every parameter changes the output."""
    config = ReftConfig(**{"rank": 3, "positions": "f2+l2", **changes})
    random = torch.Generator().manual_seed(seed)
    adapter = AdapterParameters(config, config.resolve_layers(blocks), dim, generator=random)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            step = torch.randn(parameter.shape, generator=random)
            parameter.add_(step, alpha=0.5 if name == "bias" else 0.1)
    write_adapter(path, config, adapter.export_state_dict())
    return path


def served(folders, base=None, names=tuple(MIX)):
    model = ReftModel(llama() if base is None else base)
    for name in names:
        model.pool.add(name, folders[name])
    return model


def loaded(folders, name, base=None):
    """Load the adapter alone, on a new base."""
    return ReftModel.from_pretrained(llama() if base is None else base, folders[name])


@torch.no_grad()
def logits(model, *args, **kwargs):
    return model(*args, **kwargs).logits


def equal(ours, alone):
    torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)
