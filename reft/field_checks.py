"""Declarative checks of configuration fields.

A table maps each field to a :class:`FieldCheck`: the values that the field accepts, in words and as
a predicate. :func:`check_fields` applies a table to a dataclass. Every error has one form:
``ReftConfig.rank must be an integer of at least 1, got 0``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from reft.safe_read import is_text, shown


def _unchanged(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class FieldCheck:
    """The values that one field accepts.

    Attributes:
        allowed: the accepted values in words, behind "must be".
        accepts: whether a value is accepted.
        keep: converts an accepted value to the one that the field keeps. It may refuse the value
            with a ValueError too.
        names: accepted names, from which an error suggests the nearest.
    """

    allowed: str
    accepts: Callable[[Any], bool]
    keep: Callable[[Any], Any] = _unchanged
    names: tuple[str, ...] = ()

    def __call__(self, field: str, value: Any) -> Any:
        """Return the value as the field keeps it.

        Raises:
            ValueError: the value is not accepted.
        """
        if self.accepts(value):
            try:
                return self.keep(value)
            except ValueError:
                pass
        hint = did_you_mean(value, self.names) if isinstance(value, str) else ""
        raise ValueError(f"{field} must be {self.allowed}, got {shown(value)}{hint}")


def check_fields(
    instance: Any, section: str, checks: Mapping[str, Callable[[str, Any], Any]]
) -> None:
    """Check fields of a dataclass and store the values as its fields keep them.

    Args:
        instance: may be frozen.
        section: the name of the configuration, which errors put before the field.
        checks: field to its check.

    Raises:
        ValueError: a value is not accepted.
    """
    for name, check in checks.items():
        kept = check(f"{section}.{name}", getattr(instance, name))
        object.__setattr__(instance, name, kept)


def refuse_unknown_fields(section: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError for a name that is not a known field, with the nearest known one."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(
                f"{section} has no field {shown(name)}{did_you_mean(str(name), known)}; its fields "
                f"are {', '.join(known)}"
            )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the nearest known name as part of a message; "" if none is near."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f" (did you mean {by_lower[near[0]]!r}?)" if near else ""


# -------------------------------------------------------------------- kinds of values


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number; True and False are not."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer above the largest float
        return False


def integer(low: int, bits: int | None = None) -> FieldCheck:
    """Accept an integer of at least ``low``, and below 2^``bits``."""
    limit = math.inf if bits is None else 2**bits
    bound = "" if bits is None else f" and below 2^{bits}"
    return FieldCheck(
        f"an integer of at least {low}{bound}",
        lambda value: is_integer(value) and low <= value < limit,
        int,
    )


def number(low: float, *, exclusive: bool = False, below: float = math.inf) -> FieldCheck:
    """Accept a number of at least ``low``, above it if ``exclusive``, and below ``below``."""
    bound = f"above {low:g}" if exclusive else f"of at least {low:g}"
    upper = f" and below {below:g}" if below < math.inf else ""

    def accepts(value: Any) -> bool:
        return is_number(value) and (value > low if exclusive else value >= low) and value < below

    return FieldCheck(f"a number {bound}{upper}", accepts)


def choice(*names: str) -> FieldCheck:
    """Accept one of ``names``. A member of a string enumeration is kept as plain text."""
    return FieldCheck(
        quoted(names),
        lambda value: isinstance(value, str) and value in names,
        lambda value: names[names.index(value)],
        names,
    )


def optional(check: FieldCheck) -> FieldCheck:
    """Accept None, or what another check accepts."""
    return FieldCheck(
        f"None or {check.allowed}",
        lambda value: value is None or check.accepts(value),
        lambda value: None if value is None else check.keep(value),
        check.names,
    )


def distinct(element: FieldCheck, allowed: str) -> FieldCheck:
    """Accept a tuple of different values, at least one, each accepted by ``element``."""

    def accepts(value: Any) -> bool:
        return (
            isinstance(value, tuple)
            and bool(value)
            and all(map(element.accepts, value))
            and len(set(value)) == len(value)
        )

    return FieldCheck(allowed, accepts)


def quoted(names: Iterable[str]) -> str:
    """List names for a message: ``"a", "b" or "c"``."""
    *most, last = (f'"{name}"' for name in names)
    return f"{', '.join(most)} or {last}" if most else last


BOOLEAN = FieldCheck("True or False", lambda value: isinstance(value, bool))
TEXT = FieldCheck("a string", is_text)
NAME = FieldCheck("a string that is not empty", lambda value: is_text(value) and bool(value))
