"""What the engine is told of adapters: vLLM's ``additional_config={"reft": {…}}``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

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
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"reft settings are {', '.join(known)}; got {name!r}")
        if not isinstance(given.get("folder"), str) or not Path(given["folder"]).is_dir():
            raise ValueError(
                f"reft.folder must be a directory of adapters' folders, as in {example}; "
                f"got {given.get('folder')!r}"
            )
        for name in ("resident", "hosted", "max_rank"):
            value = given.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"reft.{name} must be an integer of at least 1, got {value!r}")
        bound = given.get("max_scale", 1.0)
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 < bound < 1e3:
            raise ValueError(f"reft.max_scale must be a number above 0, below 1000; got {bound!r}")
        if given.get("prefix_keys", "blocks") not in PREFIX_KEYS:
            allowed = ", ".join(PREFIX_KEYS)
            raise ValueError(f"reft.prefix_keys must be {allowed}, got {given['prefix_keys']!r}")
        cache = given.get("cache")
        if cache is not None and not isinstance(cache, str):
            raise ValueError(f"reft.cache must be the name of a directory or None, got {cache!r}")
        return cls(**given)

    @property
    def cache_folder(self) -> Path:
        """Where admitted adapters are copied to."""
        if self.cache is not None:
            return Path(self.cache)
        shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(shared) / "reft" / "serving"
