"""Tokens that an adapter was trained to end with and its base does not stop at: they are kept with
the adapter, and ``generate`` stops there too.

They lie in the header of the weights file, where a reader that does not know them passes them by.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from reft.io.adapter_files import read_list
from reft.model.generation import Generation, settings_of

if TYPE_CHECKING:
    from reft.model.registry import AdapterRegistry

#: Where the header keeps them: a JSON list of token ids.
METADATA_KEY = "end_tokens"


def end_header(ends: Iterable[int]) -> dict[str, str]:
    """What the header of an adapter says of its ends; nothing if it has none of its own."""
    listed = list(ends)
    return {METADATA_KEY: json.dumps(listed)} if listed else {}


def read_ends(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """The ends that are stored with an adapter.

    Args:
        path: a folder that :func:`reft.io.adapter_files.read_adapter` has read.

    Raises:
        ValueError: something else stands in their place.
    """
    ends = read_list(path, METADATA_KEY, "token ids", lambda end: type(end) is int and end >= 0)
    return tuple(ends or ())


def learn_ends(registry: AdapterRegistry, base: nn.Module, taught: Iterable[int]) -> None:
    """Keep with the active adapter the ends that training teaches and the base does not know."""
    known = listed_ids(getattr(getattr(base, "generation_config", None), "eos_token_id", None))
    name = registry.active
    new = [end for end in taught if end not in known]
    if name is not None and new:
        registry.ends[name] = tuple(dict.fromkeys([*registry.ends.get(name, ()), *new]))


def stop_at_ends(
    registry: AdapterRegistry,
    base: nn.Module,
    generation: Generation,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``generate`` with the ends of the adapters that take part in it. An
    ``eos_token_id`` of the call itself is left alone."""
    if registry.call.disabled or generation.restarts or "eos_token_id" in kwargs:
        return args, kwargs
    ends = [end for name in generation.sources or () for end in registry.ends.get(name, ())]
    configured = listed_ids(settings_of(base, args, kwargs)("eos_token_id"))
    missing = [end for end in dict.fromkeys(ends) if end not in configured]
    if not missing:
        return args, kwargs
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    if given is None:
        return args, {**kwargs, "eos_token_id": [*configured, *missing]}
    given = copy.copy(given)
    given.eos_token_id = [*configured, *missing]
    if kwargs.get("generation_config") is not None:
        return args, {**kwargs, "generation_config": given}
    return (args[0], given, *args[2:]), kwargs


def listed_ids(value: Any) -> list[int]:
    """Token ids as a list, whether there are several, one or none (None)."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
