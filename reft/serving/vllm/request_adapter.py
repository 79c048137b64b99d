"""What a request carries from the front end to the scheduler and the workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite
from typing import Any

from reft.adapter.requests import Request, request_of
from reft.config import ReftConfig
from reft.serving.vllm.settings import KEY

#: The key of a request's scale in its ``extra_args``.
SCALE = "reft_scale"

#: The name that means "no adapter".
BASE = "__base__"

#: Fields of a configuration that say which tokens are edited.
_WHERE = ("positions", "tied", "untied_by", "short_prompts", "prompt_end")


@dataclass(frozen=True)
class Ticket:
    """An admitted request's adapter.

    Attributes:
        content: what its edits depend on, hashed; names the copy that the workers read.
        scale: what the edit is multiplied by.
        where: the fields of the configuration that say which tokens are edited.
        salted: whether a salt tells its cached blocks apart, so that they need no keys.
    """

    content: str
    scale: float
    where: tuple[tuple[str, Any], ...]
    salted: bool = False

    @classmethod
    def of(cls, config: ReftConfig, content: str, scale: float) -> Ticket:
        """The ticket of an adapter."""
        return cls(content, scale, tuple((name, getattr(config, name)) for name in _WHERE))

    def to_plain(self) -> dict[str, Any]:
        """As values that travel between processes."""
        where = [list(pair) for pair in self.where]
        return {
            "content": self.content, "scale": self.scale, "where": where, "salted": self.salted
        }  # fmt: skip

    @classmethod
    def from_plain(cls, value: Mapping[str, Any]) -> Ticket:
        """The inverse of :meth:`to_plain`."""
        where = tuple((str(name), given) for name, given in value["where"])
        return cls(value["content"], float(value["scale"]), where, value["salted"])

    def request(self, prompt_length: int) -> Request:
        """Which tokens of a prompt are edited, without what edits them."""
        return replace(_request(self.where, prompt_length), scale=self.scale)

    def block_key(self, prompt_length: int, start: int, stop: int) -> Any:
        """What a block of tokens ``start`` to ``stop`` − 1 depends on beside its tokens; None if
        nothing in it is edited. What came before is in the hash of the block before."""
        places = tuple(self.request(prompt_length).edited(start, stop))
        return (self.content, self.scale, places) if places else None

    def salt(self, prompt_length: int) -> str:
        """A ``cache_salt`` under which prompts share blocks rightly without keys: the content alone
        would not do, since the edited tokens move with the length of the prompt."""
        return f"reft:{self.content}:{self.scale!r}:{prompt_length}"


@lru_cache(maxsize=4096)
def _request(where: tuple[tuple[str, Any], ...], prompt_length: int) -> Request:
    return request_of(ReftConfig(**dict(where)), None, 1.0, prompt_length, "")  # type: ignore[arg-type]


def asked_for(extra: Mapping[str, Any]) -> tuple[str, float] | None:
    """(name, scale) of what a client wrote into ``extra_args``, under "reft" and "reft_scale"; None
    for no adapter.

    Raises:
        ValueError: a name that is no text, a scale that is no finite number or has no adapter.
    """
    name, scale = extra.get(KEY), extra.get(SCALE, 1.0)
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{KEY} must be an adapter's name, got {name!r}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not isfinite(scale):
        raise ValueError(f"{SCALE} must be a finite number, got {scale!r}")
    if name is None or name == BASE:
        if SCALE in extra:
            raise ValueError(f"{SCALE} needs an adapter's name under {KEY}")
        return None
    return name, float(scale)
