"""What the engine is told of adapters: vLLM's ``additional_config={"reft": {…}}``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from reft.field_checks import (
    TEXT,
    FieldCheck,
    check_fields,
    choice,
    integer,
    number,
    optional,
    refuse_unknown_fields,
)

#: The key in ``additional_config`` and in a request's ``extra_args``.
KEY = "reft"

#: How cached blocks of edited prompts are told apart.
PREFIX_KEYS = ("blocks", "salt")


@dataclass(frozen=True)
class Settings:
    """Settings of an engine.

    Attributes:
        folder: the directory that holds an adapter's folder for each name. It is looked at again
            with each request: adapters may come, go and be replaced.
        resident: adapters that stay on the device, least recently used out, at least 1.
        hosted: adapters that stay in a worker's memory, at least 1.
        max_rank: the largest rank that is admitted.
        max_scale: the largest absolute scale that a client may ask for. A huge one makes numbers
            overflow, and what an attention leaves of them in the cache harms other requests.
        prefix_keys: "blocks" for the most reuse: a cached block is told by the tokens edited in it;
            "salt" to wrap nothing of vLLM's cache: a prompt shares with prompts of its adapter and
            its length alone.
        cache: where admitted adapters are copied to, named by their content, for the workers; None
            for one under the user's cache directory.
    """

    folder: str
    resident: int = 64
    hosted: int = 1024
    max_rank: int = 64
    max_scale: float = 4.0
    prefix_keys: str = "blocks"
    cache: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, KEY, _CHECKS)

    @classmethod
    def of(cls, additional: Any) -> Settings:
        """The settings in an engine's ``additional_config``.

        Raises:
            ValueError: there are none, an unknown one, or a bad value.
        """
        given = additional.get(KEY) if isinstance(additional, Mapping) else None
        example = 'additional_config={"reft": {"folder": "adapters"}}'
        if not isinstance(given, Mapping):
            raise ValueError(f"a model of this architecture needs {example}, got {additional!r}")
        names = [field.name for field in fields(cls)]
        refuse_unknown_fields(KEY, given, names)
        if "folder" not in given:
            raise ValueError(f"reft.folder must be given, as in {example}")
        return cls(**given)

    @property
    def cache_folder(self) -> Path:
        """Where admitted adapters are copied to."""
        if self.cache is not None:
            return Path(self.cache)
        shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(shared) / "reft" / "serving"


_CHECKS = {
    "folder": FieldCheck(
        "a directory that holds the adapters' folders",
        lambda value: isinstance(value, str) and Path(value).is_dir(),
    ),
    "resident": integer(1),
    "hosted": integer(1),
    "max_rank": integer(1),
    "max_scale": number(0, exclusive=True, below=1000),
    "prefix_keys": choice(*PREFIX_KEYS),
    "cache": optional(TEXT),
}
