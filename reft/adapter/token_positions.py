"""The edited tokens of a prompt, computed on the host from the length of the prompt.

Engines need them this way: they cut prompts into chunks and share cached blocks between prompts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import torch

from reft.config import ReftConfig
from reft.positions import padded_positions

#: (position in the prompt, group of weights) of each edited token, ascending.
TokenPositions = tuple[tuple[int, int], ...]


def token_positions(config: ReftConfig, prompt_length: int) -> TokenPositions:
    """Return the edited tokens of a prompt, with the group of weights that edits each.

    The rule is :func:`reft.positions.padded_positions`, applied to one prompt without padding.

    Raises:
        ValueError: positions "image" or "given", which do not follow from the length.
    """
    spec = config.parsed_positions
    positions = padded_positions(
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
        groups = [0] * len(positions)
    pairs = zip(positions, groups, strict=True)
    return tuple(sorted((position, group) for position, group in pairs if position >= 0))


def positions_between(positions: TokenPositions, start: int, stop: int) -> TokenPositions:
    """Select the edited tokens from position ``start`` to ``stop`` − 1."""
    return positions[bisect_left(positions, (start,)) : bisect_left(positions, (stop,))]
