"""An adapter of three layers with random parameters."""

from __future__ import annotations

import torch

from reft.adapter.parameters import AdapterParameters
from reft.config import ReftConfig

LAYERS, RANK, DIM = (1, 3, 4), 4, 20


def make_adapter(
    intervention="loreft", seed=0, dim=DIM, layers=LAYERS, **changes
) -> AdapterParameters:
    changes = {"rank": RANK, "positions": "f2+l2", "tied": False, **changes}
    config = ReftConfig(intervention=intervention, **changes)
    return AdapterParameters(config, layers, dim, generator=torch.Generator().manual_seed(seed))
