"""Named parts of the rank, which can be trained apart and used together.

R has orthonormal rows, so that an edit is a sum of edits in directions that do not meet,

    h' = h + Σ_{i ∈ S} R_iᵀ (act(W h + b) − σ R h)_i

and a sequence may have that of some of them, S, alone. pyreft's ``examples/composition`` is the
source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reft.safe_read import is_text, shown

#: Parts of the rank by name, as a configuration keeps them: pairs, so that it can be hashed.
Subspaces = tuple[tuple[str, tuple[int, ...]], ...]


def check_subspaces(value: Any, rank: int) -> Subspaces | None:
    """The field ``subspaces`` of a configuration, a mapping or its pairs, checked.

    Raises:
        ValueError: not a mapping of names to lists of different numbers below the rank.
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
    found = {}
    for name, part in parts.items():
        listed = isinstance(part, Sequence) and not isinstance(part, str) and len(part) > 0
        if (
            not is_text(name)
            or not name
            or not listed
            or not all(type(one) is int and 0 <= one < rank for one in part)
            or len(set(part)) != len(part)
        ):
            raise ValueError(
                f"ReftConfig.subspaces must be {allowed}, got {shown(name)}: {shown(part)}"
            )
        found[name] = tuple(sorted(part))
    return tuple(found.items())


def active_ranks(subspaces: Subspaces | None, value: Any, adapter: str) -> tuple[int, ...] | None:
    """The directions that one sequence's edit has.

    Args:
        subspaces: of its adapter.
        value: a name, several, or None.
        adapter: its name, for messages.

    Returns:
        Their numbers, ascending; None for all.

    Raises:
        ValueError: a name that the adapter does not have.
    """
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    known = dict(subspaces or ())
    kept: set[int] = set()
    for name in names:
        if name not in known:
            has = f"has {', '.join(map(repr, known))}" if known else "has none"
            raise ValueError(
                f"subspaces must be names of parts of the sequence's adapter; {adapter!r} {has}, "
                f"got {name!r}"
            )
        kept |= set(known[name])
    return tuple(sorted(kept))


def one_a_sequence(value: Any, batch: int) -> Sequence[Any]:
    """The argument ``subspaces`` of a forward as a list of one entry a sequence.

    Raises:
        ValueError: a list of another length.
    """
    if isinstance(value, str):
        return [value] * batch
    entries: Sequence[Any] | None = value if isinstance(value, Sequence) else None
    if (
        entries is None
        or len(entries) != batch
        or not all(one is None or isinstance(one, Sequence) for one in entries)
    ):
        raise ValueError(
            "subspaces must be one name for all sequences, or a list with a name, several names or "
            f"None for each of the {batch}; got {value!r}"
        )
    return entries
