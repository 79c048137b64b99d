"""Who edits what in a batch: the adapters that it names, each with its sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from reft.adapter.device_cache import EditSite
from reft.adapter.host_adapter import HostAdapter
from reft.adapter.multi_device import MultiDeviceParameters
from reft.adapter.parameters import AdapterParameters
from reft.config import ReftConfig
from reft.subspaces import active_ranks, subspaces_per_sequence

if TYPE_CHECKING:
    from reft.model.registry import AdapterRegistry

#: The adapter name that means "no adapter", PEFT's.
BASE = "__base__"

_LISTS = (list, tuple)

_ONE_EACH = "one adapter edits a sequence"

#: What a name stands for: parameters on the model, or an adapter of the pool.
Source = AdapterParameters | MultiDeviceParameters | HostAdapter


@dataclass(frozen=True, eq=False)
class BatchAdapter:
    """One adapter in a batch.

    Attributes:
        name: its name.
        source: what that stands for.
        sequences: the numbers of its sequences; None for all of the batch.
        kept: the directions of it that are used; None for all.
        scale: what its edit is multiplied by.
    """

    name: str
    source: Source
    sequences: tuple[int, ...] | None
    kept: tuple[int, ...] | None
    scale: float

    @property
    def config(self) -> ReftConfig:
        """What it is."""
        return self.source.config


def choose(
    registry: AdapterRegistry,
    names: Sequence[str] | None,
    scales: Any,
    subspaces: Any,
    batch: int,
    sources: Mapping[str, Source],
    active: str | None,
) -> list[BatchAdapter]:
    """The adapters of a batch.

    Args:
        names: one a sequence, or None for ``active``.
        scales: one number for all or one a sequence; None for 1.
        subspaces: see :mod:`reft.subspaces`.
        batch: sequences.
        sources: what the names stand for.
        active: the adapter of the whole batch where no names are given.

    Raises:
        ValueError: not one a sequence, a scale that is no finite number.
    """
    if names is None and not isinstance(scales, _LISTS) and not isinstance(subspaces, _LISTS):
        # Nothing here depends on the number of sequences: compiled models need no other graph.
        assert active is not None
        part = None if subspaces is None else subspaces_per_sequence(subspaces, 1)[0]
        kept = active_ranks(sources[active].config.subspaces, part, active)  # type: ignore[arg-type]
        return [BatchAdapter(active, sources[active], None, kept, scales_of(scales, 1)[0])]
    listed = [str(active)] * batch if names is None else names_of(registry, names, batch)
    factors = scales_of(scales, batch)
    parts = [None] * batch if subspaces is None else subspaces_per_sequence(subspaces, batch)
    found: dict[tuple[str, tuple[int, ...] | None, float], list[int]] = {}
    for index, (name, part, scale) in enumerate(zip(listed, parts, factors, strict=True)):
        known = None if name == BASE else sources[name].config.subspaces
        kept = active_ranks(known, part, name)  # type: ignore[arg-type]
        if name != BASE:
            found.setdefault((name, kept, scale), []).append(index)
    if names is not None:
        registry.heads.check_mixed(set(listed), registry.active)
    everywhere = len(found) == 1 and BASE not in listed
    return [
        BatchAdapter(name, sources[name], None if everywhere else tuple(numbers), kept, scale)
        for (name, kept, scale), numbers in found.items()
    ]


def sources_by_name(registry: AdapterRegistry, names: Sequence[str]) -> dict[str, Source]:
    """What names stand for, "__base__" left out.

    Raises:
        ValueError: there is no adapter of a name.
    """
    pool = registry.pool.adapters
    found: dict[str, Source] = {}
    for name in dict.fromkeys(names):
        if name != BASE:
            stored = pool.get(name)  # one look: another thread may remove it
            found[name] = registry.adapter(name) if stored is None else stored
    return found


def sites_of(source: Source) -> tuple[EditSite, ...]:
    """Where an adapter edits."""
    return tuple((layer, source.config.component) for layer in source.layers)


def names_of(registry: AdapterRegistry, names: Sequence[str], batch: int) -> Sequence[str]:
    """One name a sequence.

    Raises:
        ValueError: there are more or fewer, or several for one sequence.
    """
    if isinstance(names, str) or not isinstance(names, Sized) or len(names) != batch:
        raise ValueError(
            f"adapter_names must be a list of one name a sequence ({batch} of them), got {names!r}"
        )
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(
                f"adapter_names must be a list of one name a sequence, got {name!r} for sequence "
                f"{index}; {_ONE_EACH}, {BASE!r} stands for none"
            )
    return names


def one_name(name: object) -> str:
    """The name of one adapter, as it is or alone in a list, as ``active_adapters`` gives it.

    Raises:
        ValueError: several names, or none.
    """
    if isinstance(name, (list, tuple)) and len(name) == 1:
        [name] = name
    if not isinstance(name, str):
        raise ValueError(
            f"adapter_name must be one name, got {name!r}; {_ONE_EACH}, and a batch of several "
            "adapters names one for each of its sequences in adapter_names"
        )
    return name


def scales_of(scales: Any, batch: int) -> Sequence[float]:
    """One factor a sequence.

    Raises:
        ValueError: more or fewer of them, or one that is no finite number.
    """
    if scales is None:
        return [1.0] * batch
    listed = list(scales) if isinstance(scales, (list, tuple)) else [scales] * batch
    if len(listed) != batch:
        raise ValueError(
            f"adapter_scales must be a number or one a sequence ({batch} of them), got {scales!r}"
        )
    for one in listed:
        if isinstance(one, bool) or not isinstance(one, (int, float)) or not isfinite(one):
            raise ValueError(f"adapter_scales must be finite numbers, got {one!r}")
    return [float(one) for one in listed]
