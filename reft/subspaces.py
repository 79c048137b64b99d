"""Subspaces: named parts of the rank, trained separately and used together.

If R has orthonormal rows, an edit is a sum of edits in orthogonal directions,

    h' = h + Σ_{i ∈ S} R_iᵀ (act(W h + b) − σ R h)_i

and S may be a subset of the directions for each sequence. pyreft's ``examples/composition`` is the
source of the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reft.safe_read import is_text, shown

#: Subspaces of a configuration as pairs (name, directions), which can be hashed.
Subspaces = tuple[tuple[str, tuple[int, ...]], ...]


def check_subspaces(value: Any, rank: int) -> Subspaces | None:
    """Check the field ``subspaces`` of a configuration, a mapping or its pairs.

    Raises:
        ValueError: the value is not a mapping of names to lists of different numbers below the
            rank.
    """
    if value is None:
        return None
    allowed = f"None or names with lists of different numbers from 0 to {rank - 1}"
    try:
        parts = dict(value)
    except (TypeError, ValueError):
        parts = {}
    if not parts:
        raise ValueError(f"ReftConfig.subspaces must be {allowed}, got {shown(value)}")
    checked = {}
    for name, part in parts.items():
        listed = isinstance(part, Sequence) and not isinstance(part, str) and len(part) > 0
        if (
            not is_text(name)
            or not name
            or not listed
            or not all(type(index) is int and 0 <= index < rank for index in part)
            or len(set(part)) != len(part)
        ):
            raise ValueError(
                f"ReftConfig.subspaces must be {allowed}, got {shown(name)}: {shown(part)}"
            )
        checked[name] = tuple(sorted(part))
    return tuple(checked.items())


def active_ranks(subspaces: Subspaces | None, value: Any, adapter: str) -> tuple[int, ...] | None:
    """Return the directions that a sequence is edited in.

    Args:
        subspaces: the subspaces of the sequence's adapter.
        value: a name, several names, or None.
        adapter: the name of the adapter, for messages.

    Returns:
        Numbers of the directions, ascending; None for all.

    Raises:
        ValueError: the adapter has no subspace of this name.
    """
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    known = dict(subspaces or ())
    active: set[int] = set()
    for name in names:
        if name not in known:
            has = f"has {', '.join(map(repr, known))}" if known else "has none"
            raise ValueError(
                f"subspaces must be names of subspaces of the sequence's adapter; {adapter!r} "
                f"{has}, got {name!r}"
            )
        active |= set(known[name])
    return tuple(sorted(active))


def subspaces_per_sequence(value: Any, batch: int) -> Sequence[Any]:
    """Return the argument ``subspaces`` of a forward as a list with an entry for each sequence.

    Raises:
        ValueError: the list has another length.
    """
    if isinstance(value, str):
        return [value] * batch
    entries: Sequence[Any] | None = value if isinstance(value, Sequence) else None
    if (
        entries is None
        or len(entries) != batch
        or not all(entry is None or isinstance(entry, Sequence) for entry in entries)
    ):
        raise ValueError(
            "subspaces must be one name for all sequences, or a list with a name, several names or "
            f"None for each of the {batch}; got {value!r}"
        )
    return entries
