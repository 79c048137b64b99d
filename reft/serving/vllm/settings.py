"""The plugin's settings of an engine, vLLM's ``additional_config={"reft": {…}}``."""

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

#: How cached blocks of edited prompts are separated.
PREFIX_KEYS = ("blocks", "salt")

#: Former name of a setting to its present one.
_RENAMED = {"resident": "max_adapters", "hosted": "max_cpu_adapters"}


@dataclass(frozen=True)
class Settings:
    """Settings of an engine.

    Attributes:
        folder: the directory with one subfolder for each adapter, named like it. It is read again
            for each request: adapters may be added, removed and replaced.
        max_adapters: the number of adapters that stay on the device, at least 1. The least recently
            used ones are evicted.
        max_cpu_adapters: the number of adapters that stay in a worker's memory, at least 1.
        max_rank: the largest rank that is served.
        max_scale: the largest absolute scale that a client may request. A huge scale overflows, and
            NaN in the KV cache harms other requests.
        prefix_keys: "blocks" for the most reuse: a cached block is identified by the tokens edited
            in it. "salt" leaves vLLM's cache unpatched: a prompt shares blocks only with prompts of
            its adapter and its length.
        cache: where accepted adapters are copied for the workers, named by content hash; None for a
            folder in the user's cache directory.
    """

    folder: str
    max_adapters: int = 64
    max_cpu_adapters: int = 1024
    max_rank: int = 64
    max_scale: float = 4.0
    prefix_keys: str = "blocks"
    cache: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, KEY, _CHECKS)

    @classmethod
    def of(cls, additional: Any) -> Settings:
        """Read the settings from an engine's ``additional_config``.

        Raises:
            ValueError: no settings, an unknown one, or an invalid value.
        """
        given = additional.get(KEY) if isinstance(additional, Mapping) else None
        example = 'additional_config={"reft": {"folder": "adapters"}}'
        if not isinstance(given, Mapping):
            raise ValueError(f"a model of this architecture needs {example}, got {additional!r}")
        for name, present in _RENAMED.items():
            if name in given:
                raise ValueError(f"reft.{name} is called reft.{present} now")
        refuse_unknown_fields(KEY, given, [field.name for field in fields(cls)])
        if "folder" not in given:
            raise ValueError(f"reft.folder must be given, as in {example}")
        return cls(**given)

    @property
    def cache_folder(self) -> Path:
        """The folder that accepted adapters are copied to."""
        if self.cache is not None:
            return Path(self.cache)
        shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(shared) / "reft" / "serving"


_CHECKS = {
    "folder": FieldCheck(
        "a directory that holds the adapters' folders",
        lambda value: isinstance(value, str) and Path(value).is_dir(),
    ),
    "max_adapters": integer(1),
    "max_cpu_adapters": integer(1),
    "max_rank": integer(1),
    "max_scale": number(0, exclusive=True, below=1000),
    "prefix_keys": choice(*PREFIX_KEYS),
    "cache": optional(TEXT),
}
