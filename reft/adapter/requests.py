"""Requests of an engine that computes chunks of many prompts in one step.

The adapter and the edited tokens of a request are determined on the host, once a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from reft.adapter.device_cache import CacheItem, CacheKey
from reft.adapter.token_positions import TokenPositions, positions_between, token_positions
from reft.config import ReftConfig

#: The adapter name that means "no adapter"; PEFT uses it too.
BASE = "__base__"

#: The largest id of an edited token is the next smaller one; transformers uses −1 itself.
_BELOW_TOKENS = -2

#: Engines hash ids as signed integers of 32 bits.
_SMALLEST = -(2**31)


@dataclass(frozen=True, eq=False)
class Request:
    """The edit of one request, determined when the request is added.

    Attributes:
        item: the weights of its adapter and where they act; None for no adapter.
        scale: multiplies the edit.
        positions: the edited tokens of the prompt, and of "prompt+g…" those generated behind it.
        all_from: every token from this position on is edited too (positions "all"); else None.
    """

    item: CacheItem | None = None
    scale: float = 1.0
    positions: TokenPositions = ()
    all_from: int | None = None

    def edited(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield (position, group) of the edited tokens ``start`` to ``stop`` − 1, ascending."""
        if self.positions and start <= self.positions[-1][0]:
            yield from positions_between(self.positions, start, stop)
        if self.all_from is not None:
            for position in range(max(start, self.all_from), stop):
                yield position, 0


#: A request without an adapter.
UNEDITED = Request()


def make_request(
    config: ReftConfig, item: CacheItem | None, scale: float, prompt_length: int, name: str
) -> Request:
    """Make the request of a prompt.

    Args:
        config: of its adapter.
        item: the weights of its adapter; None if only the edited tokens are needed.
        scale: multiplies the edit.
        prompt_length: tokens of the prompt.
        name: of its adapter, for the error.

    Raises:
        ValueError: positions "image" or "given", which do not follow from token ids.
    """
    spec = config.parsed_positions
    if spec.kind in ("image", "given"):
        raise ValueError(
            f'adapter {name!r} has positions "{spec.kind}", which a request of token ids does not '
            "determine; use generate"
        )
    positions = token_positions(config, prompt_length)
    generated = range(prompt_length, prompt_length + spec.generated)
    positions = (*positions, *((position, 0) for position in generated))
    return Request(item, scale, positions, prompt_length if spec.kind == "all" else None)


class Chunk(NamedTuple):
    """The tokens ``start`` to ``stop`` − 1 of a request, computed in one step."""

    request: Request
    start: int
    stop: int


#: (key, scale) of an adapter to its item, and to the edited rows of the step for each group.
StepRows = dict[tuple[CacheKey, float], tuple[CacheItem, dict[int, list[int]]]]


def step_rows(chunks: Sequence[Chunk]) -> StepRows:
    """Collect the edited rows of a step, for each adapter and scale.

    Args:
        chunks: in the order in which the step concatenates them.
    """
    by_adapter: StepRows = {}
    first_row = 0
    for request, start, stop in chunks:
        if request.item is not None:
            for position, group in request.edited(start, stop):
                _, rows = by_adapter.setdefault(
                    (request.item.key, request.scale), (request.item, {})
                )
                rows.setdefault(group, []).append(first_row + position - start)
        first_row += stop - start
    return by_adapter


class TokenKeys:
    """Token ids that distinguish edits, for engines that share blocks between equal ids.

    An edited token gets a number below −1 that stands for its adapter, group, scale and token.
    Equal lists are then computed with equal edits at equal positions.

    Args:
        vocabulary: larger than any token id.
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._edit_numbers: dict[tuple[CacheKey, float, int], int] = {}

    def replace_edited(self, request: Request, tokens: Sequence[int]) -> list[int] | None:
        """Replace the ids of the edited tokens of a request.

        Args:
            request: the edit.
            tokens: ids of its first tokens.

        Returns:
            None if no numbers are left for its adapter, or a token is outside the vocabulary. Its
            blocks must not be shared then.
        """
        ids = list(tokens)
        if request.item is None:
            return ids
        for position, group in request.edited(0, len(ids)):
            edit = request.item.key, request.scale, group
            number = self._edit_numbers.setdefault(edit, len(self._edit_numbers))
            replacement = _BELOW_TOKENS - (number * self.vocabulary + ids[position])
            if replacement < _SMALLEST or not 0 <= ids[position] < self.vocabulary:
                return None
            ids[position] = replacement
        return ids
