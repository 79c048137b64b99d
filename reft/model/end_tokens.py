"""End tokens of an adapter: tokens that its training data end with and the base does not stop at.

``generate`` stops at them too. They are stored in the header of the weights file, which readers
that do not know them ignore.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from reft.io.adapter_files import read_list
from reft.model.generate_arguments import settings_of
from reft.model.generation import Generation

if TYPE_CHECKING:
    from reft.model.registry import AdapterRegistry

#: Key of the header: a JSON list of token ids.
METADATA_KEY = "end_tokens"


def end_header(ends: Iterable[int]) -> dict[str, str]:
    """The header entry for an adapter's end tokens; empty if it has none."""
    listed = list(ends)
    return {METADATA_KEY: json.dumps(listed)} if listed else {}


def read_ends(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Read the end tokens that are stored with an adapter.

    Args:
        path: a folder that :func:`reft.io.adapter_files.read_adapter` has read.

    Raises:
        ValueError: the header's entry is not a list of token ids.
    """
    ends = read_list(path, METADATA_KEY, "token ids", lambda end: type(end) is int and end >= 0)
    return tuple(ends or ())


def learn_ends(registry: AdapterRegistry, base: nn.Module, taught: Iterable[int]) -> None:
    """Add end tokens of training data to the active adapter, but for those of the base."""
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
    """Add the end tokens of the adapters in a batch to the arguments of ``generate``.

    An explicit ``eos_token_id`` in the call takes precedence: nothing is added then.
    """
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
    """Token ids as a list, given a list, a tensor, a single id or None."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
