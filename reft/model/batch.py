"""The adapters of a batch: their sequences, directions and scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from math import isfinite
from typing import Any

from reft.adapter.requests import BASE
from reft.adapter.sources import AdapterSource
from reft.config import ReftConfig
from reft.subspaces import Subspaces, active_ranks, subspaces_per_sequence

_LISTS = (list, tuple)

_ONE_ADAPTER = "one adapter edits a sequence"


@dataclass(frozen=True, eq=False)
class BatchAdapter:
    """One adapter in a batch.

    Attributes:
        name: its name.
        source: its parameters, or the adapter of the pool.
        sequences: the indices of its sequences; None for the whole batch.
        active_ranks: the directions of its edit that are used; None for all.
        scale: factor of its edit.
    """

    name: str
    source: AdapterSource
    sequences: tuple[int, ...] | None = None
    active_ranks: tuple[int, ...] | None = None
    scale: float = 1.0

    @property
    def config(self) -> ReftConfig:
        """The adapter's configuration."""
        return self.source.config


def batch_adapters(
    names: Sequence[str] | None,
    scales: Any,
    subspaces: Any,
    batch: int,
    sources: Mapping[str, AdapterSource],
    active: str | None,
) -> list[BatchAdapter]:
    """The adapters of a batch, one for each combination of name, directions and scale.

    Args:
        names: one per sequence, or None for ``active``.
        scales: one factor for all or one per sequence; None for 1.
        subspaces: see :mod:`reft.subspaces`.
        batch: sequences.
        sources: the adapters by name.
        active: the adapter of the whole batch where no names are given.

    Raises:
        ValueError: a list without exactly one entry per sequence, or a scale that is not finite.
    """
    if names is None and not isinstance(scales, _LISTS) and not isinstance(subspaces, _LISTS):
        # Nothing depends on the number of sequences, so that a compiled model needs one graph.
        assert active is not None
        part = None if subspaces is None else subspaces_per_sequence(subspaces, 1)[0]
        ranks = active_ranks(_subspaces(sources[active]), part, active)
        return [BatchAdapter(active, sources[active], None, ranks, scales_of(scales, 1)[0])]
    listed = [str(active)] * batch if names is None else names_of(names, batch)
    factors = scales_of(scales, batch)
    parts = [None] * batch if subspaces is None else subspaces_per_sequence(subspaces, batch)
    sequences: dict[tuple[str, tuple[int, ...] | None, float], list[int]] = {}
    for index, (name, part, scale) in enumerate(zip(listed, parts, factors, strict=True)):
        known = None if name == BASE else _subspaces(sources[name])
        ranks = active_ranks(known, part, name)
        if name != BASE:
            sequences.setdefault((name, ranks, scale), []).append(index)
    whole_batch = len(sequences) == 1 and BASE not in listed
    return [
        BatchAdapter(name, sources[name], None if whole_batch else tuple(indices), ranks, scale)
        for (name, ranks, scale), indices in sequences.items()
    ]


def _subspaces(source: AdapterSource) -> Subspaces | None:
    return source.config.subspaces  # type: ignore[return-value]  # checked by ReftConfig


def names_of(names: Sequence[str], batch: int) -> Sequence[str]:
    """Check that there is one adapter name per sequence.

    Raises:
        ValueError: the number of names is wrong, or an entry is not one name.
    """
    if isinstance(names, str) or not isinstance(names, Sized) or len(names) != batch:
        raise ValueError(
            f"adapter_names must be a list of one name per sequence ({batch} of them), got "
            f"{names!r}"
        )
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(
                f"adapter_names must be a list of one name per sequence, got {name!r} for sequence "
                f"{index}; {_ONE_ADAPTER}, {BASE!r} stands for none"
            )
    return names


def one_name(name: object) -> str:
    """The name of one adapter, given as a string or alone in a list, as ``active_adapters`` is.

    Raises:
        ValueError: several names, or none.
    """
    if isinstance(name, _LISTS) and len(name) == 1:
        [name] = name
    if not isinstance(name, str):
        raise ValueError(
            f"adapter_name must be one name, got {name!r}; {_ONE_ADAPTER}, and a batch of several "
            "adapters names one for each of its sequences in adapter_names"
        )
    return name


def scales_of(scales: Any, batch: int) -> Sequence[float]:
    """One factor per sequence.

    Raises:
        ValueError: the number of factors is wrong, or one is not a finite number.
    """
    if scales is None:
        return [1.0] * batch
    listed = list(scales) if isinstance(scales, _LISTS) else [scales] * batch
    if len(listed) != batch:
        raise ValueError(
            f"adapter_scales must be a number or one per sequence ({batch} of them), got {scales!r}"
        )
    for scale in listed:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not isfinite(scale):
            raise ValueError(f"adapter_scales must be finite numbers, got {scale!r}")
    return [float(scale) for scale in listed]
