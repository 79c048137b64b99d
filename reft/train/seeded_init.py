"""Initialisation of an adapter from the seed of the run that trains it."""

from __future__ import annotations

import logging

import torch

from reft.adapter.untrained import is_untrained
from reft.model.reft_model import ReftModel

logger = logging.getLogger(__name__)


def initialise_from_seed(model: ReftModel, seed: int) -> None:
    """Initialise the active adapter again, from a generator with this seed on the CPU.

    This changes only an adapter that still has the initialisation which ``get_reft_model`` or
    ``add_adapter`` drew from the global random numbers. An adapter that was initialised with
    ``generator=`` or by this function, loaded, assigned or trained is left as it is.

    The values are those of ``get_reft_model(…, generator=torch.Generator().manual_seed(seed))``.
    modules_to_save are copies of the base's modules and not initialised. The global random state
    does not change.
    """
    name = model.active_adapter
    if name is None:
        return
    adapter = model._registry.adapter(name)
    if not is_untrained(adapter):
        return
    adapter.reset_parameters(torch.Generator().manual_seed(seed))
    logger.info("adapter %r is initialised from seed %d", name, seed)
