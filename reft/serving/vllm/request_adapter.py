"""The adapter of a request, as it travels from the front end to the scheduler and the workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite
from typing import Any

from reft.adapter.requests import BASE, Request, make_request
from reft.config import ReftConfig
from reft.serving.vllm.settings import KEY

#: The key of a request's scale in its ``extra_args``.
SCALE = "reft_scale"

#: Fields of a configuration that determine the edited tokens.
_POSITION_FIELDS = ("positions", "tied", "untied_by", "short_prompts", "prompt_end")


@dataclass(frozen=True)
class RequestAdapter:
    """The adapter of an accepted request.

    Attributes:
        content_hash: of the adapter; names the copy that the workers read.
        scale: multiplies the edit.
        position_fields: the fields of the configuration that determine the edited tokens.
        salted: whether a salt separates its cached blocks, so that they need no keys.
    """

    content_hash: str
    scale: float
    position_fields: tuple[tuple[str, Any], ...]
    salted: bool = False

    @classmethod
    def from_config(cls, config: ReftConfig, content_hash: str, scale: float) -> RequestAdapter:
        """Take the position fields from a configuration."""
        values = tuple((name, getattr(config, name)) for name in _POSITION_FIELDS)
        return cls(content_hash, scale, values)

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that travel between processes."""
        return {
            "content_hash": self.content_hash,
            "scale": self.scale,
            "position_fields": [list(pair) for pair in self.position_fields],
            "salted": self.salted,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RequestAdapter:
        """Invert :meth:`to_dict`."""
        position_fields = tuple((str(name), value) for name, value in values["position_fields"])
        return cls(
            values["content_hash"], float(values["scale"]), position_fields, values["salted"]
        )

    def request(self, prompt_length: int) -> Request:
        """Determine the edited tokens of a prompt; the request has no weights."""
        return replace(_request(self.position_fields, prompt_length), scale=self.scale)

    def block_key(self, prompt_length: int, start: int, stop: int) -> Any:
        """Return what the block of tokens ``start`` to ``stop`` − 1 depends on beside its tokens.

        None if no token of the block is edited. Earlier tokens are covered by the hash of the block
        before.
        """
        edited = tuple(self.request(prompt_length).edited(start, stop))
        return (self.content_hash, self.scale, edited) if edited else None

    def salt(self, prompt_length: int) -> str:
        """Return a ``cache_salt`` with which prompts share blocks correctly without block keys.

        The content hash alone is not enough: the edited tokens depend on the length of the prompt.
        """
        return f"reft:{self.content_hash}:{self.scale!r}:{prompt_length}"


@lru_cache(maxsize=4096)
def _request(position_fields: tuple[tuple[str, Any], ...], prompt_length: int) -> Request:
    return make_request(ReftConfig(**dict(position_fields)), None, 1.0, prompt_length, "")


def requested_adapter(extra: Mapping[str, Any]) -> tuple[str, float] | None:
    """Read the adapter's name and scale from a client's ``extra_args``.

    Args:
        extra: the name under "reft", the scale under "reft_scale".

    Returns:
        None for no adapter.

    Raises:
        ValueError: a name that is not a string, a scale that is not a finite number or has no
            adapter.
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
