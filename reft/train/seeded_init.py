"""First values of an adapter from the seed of the run that trains it."""

from __future__ import annotations

import logging

import torch

from reft.adapter.fresh import is_fresh
from reft.model.reft_model import ReftModel

logger = logging.getLogger(__name__)


def draw_from_seed(model: ReftModel, seed: int) -> None:
    """Draw the active adapter's first values anew, from a generator of this seed, on the CPU.

    Only where they are still those that ``get_reft_model`` or ``add_adapter`` drew from the global
    random numbers: what was drawn by ``generator=``, loaded, set or trained stays, and so does what
    this function has drawn. The values are those of
    ``get_reft_model(…, generator=torch.Generator().manual_seed(seed))``; heads, copies of the
    base's modules, are not drawn. The global random numbers stay where they are.
    """
    name = model.active_adapter
    if name is None:
        return
    adapter = model._registry.adapter(name)
    if not is_fresh(adapter):
        return
    adapter.reset_parameters(torch.Generator().manual_seed(seed))
    logger.info("the first values of adapter %r are drawn from seed %d", name, seed)
