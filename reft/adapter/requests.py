"""The requests of an engine that mixes chunks of many prompts in one step: what edits each of them,
and at which of its tokens. All of it is told on the host, once for each request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from reft.adapter.device_cache import CacheItem, Key
from reft.adapter.token_positions import Places, block_places, edited_places
from reft.config import ReftConfig

#: Ids below this one stand for edited tokens; transformers uses −1 itself.
_LAST = -2

#: Ids are hashed as signed integers of 32 bits.
_SMALLEST = -(2**31)


@dataclass(frozen=True, eq=False)
class Request:
    """What edits one request, settled when it came.

    Attributes:
        resident: A, b and R and where they act; None for no adapter.
        scale: what the edit is multiplied by.
        places: the edited tokens of which the number is known: of the prompt, and those of
            "prompt+g…" behind it.
        everything_from: every token from here on is edited too ("all"); None otherwise.
    """

    resident: CacheItem | None = None
    scale: float = 1.0
    places: Places = ()
    everything_from: int | None = None

    def edited(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(token, group) of the edited ones among tokens ``start`` to ``stop`` − 1, ascending."""
        places = self.places
        if places and start <= places[-1][0]:
            yield from block_places(places, start, stop)
        if self.everything_from is not None:
            for at in range(max(start, self.everything_from), stop):
                yield at, 0


#: A request without an adapter.
UNEDITED = Request()


def request_of(
    config: ReftConfig, resident: CacheItem, scale: float, prompt_length: int, name: str
) -> Request:
    """The request of a prompt.

    Args:
        config: of its adapter, whose name is ``name``.
        resident: what edits.
        scale: what the edit is multiplied by.
        prompt_length: tokens of the prompt.

    Raises:
        ValueError: positions "image" or "given", which no length tells.
    """
    spec = config.parsed_positions
    if spec.kind in ("image", "given"):
        raise ValueError(
            f'adapter {name!r} has positions "{spec.kind}", which a request of token ids does not '
            "tell; use generate"
        )
    n = prompt_length
    places = edited_places(config, n)
    if spec.generated:
        places = (*places, *((at, 0) for at in range(n, n + spec.generated)))
    return Request(resident, scale, places, n if spec.kind == "all" else None)


class Chunk(NamedTuple):
    """Tokens ``start`` to ``stop`` − 1 of a request, which a step computes."""

    request: Request
    start: int
    stop: int


def step_rows(
    parts: Sequence[Chunk],
) -> dict[tuple[Key, float], tuple[CacheItem, dict[int, list[int]]]]:
    """The rows of a step that are edited.

    Args:
        parts: in the order in which they lie behind one another.

    Returns:
        (key, scale) of each adapter that edits any -> what edits, and group -> rows of the step.
    """
    found: dict[tuple[Key, float], tuple[CacheItem, dict[int, list[int]]]] = {}
    first = 0
    for request, start, stop in parts:
        resident = request.resident
        if resident is not None:
            for at, group in request.edited(start, stop):
                key = resident.key, request.scale
                if key not in found:
                    found[key] = resident, {}
                found[key][1].setdefault(group, []).append(first + at - start)
        first += stop - start
    return found


class TokenKeys:
    """Token ids for engines that share what they computed between requests with equal ids.

    In place of every edited token stands a number below −1, for its adapter, the set of weights,
    the scale and the token: equal lists were computed with equal edits at equal places.

    Args:
        vocabulary: more than any token id.
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._numbers: dict[tuple[Key, float, int], int] = {}

    def keyed(self, request: Request, tokens: Sequence[int]) -> list[int] | None:
        """The ids of a request's first tokens; None if there are no numbers left for its adapter,
        or a token outside the vocabulary: then nothing of it may be shared."""
        ids = list(tokens)
        if request.resident is None:
            return ids
        for at, group in request.edited(0, len(ids)):
            edit = request.resident.key, request.scale, group
            number = self._numbers.setdefault(edit, len(self._numbers))
            stand_in = _LAST - (number * self.vocabulary + ids[at])
            if stand_in < _SMALLEST or not 0 <= ids[at] < self.vocabulary:
                return None
            ids[at] = stand_in
        return ids
