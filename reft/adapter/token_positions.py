"""Which tokens of a prompt an adapter edits, told on the host by the length of the prompt alone:
what engines need that cut prompts into chunks and share blocks of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import torch

from reft.config import ReftConfig
from reft.positions import padded_positions

#: (position in the prompt, group), ascending.
Places = tuple[tuple[int, int], ...]


def edited_places(config: ReftConfig, prompt_length: int) -> Places:
    """Every prompt token that is edited, with the set of weights that edits it.

    The rule is :func:`reft.positions.padded_positions`, asked for one prompt without padding.

    Raises:
        ValueError: positions "image" or "given", which no length tells.
    """
    spec = config.parsed_positions
    places = padded_positions(
        spec,
        torch.zeros(1, dtype=torch.int64),
        torch.tensor([prompt_length]),
        seq_len=prompt_length,
        short_prompts=config.short_prompts,
        prompt_end=config.prompt_end,
    )[0].tolist()
    if spec.kind == "ends":
        groups: Iterable[int] = spec.columns(config.tied, config.untied_by)
    else:
        groups = [0] * len(places)
    return tuple(sorted((at, k) for at, k in zip(places, groups, strict=True) if at >= 0))


def block_places(places: Places, start: int, stop: int) -> Places:
    """Those of positions ``start`` to ``stop`` − 1."""
    return places[bisect_left(places, (start,)) : bisect_left(places, (stop,))]
