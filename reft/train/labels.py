"""What labels of a feature stand for: the tokens that follow, a class of each, or of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: The label that no loss counts.
IGNORED = -100

#: The ids of the tokens themselves, which a language model is to predict; a class of each token;
#: one or several labels of the whole sequence.
KINDS = ("next", "token", "sequence")


def as_numbers(value: Any) -> Any:
    """Tensors, arrays and sequences as lists; one number as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    plain = not value or type(value[0]) in (int, float, bool)
    return list(value) if plain else [as_numbers(one) for one in value]


def kind_of(labels: Any, ids: Sequence[int]) -> str:
    """Which of :data:`KINDS` the labels of one sequence are, told from themselves.

    One number, a list of another length than the tokens, and floats or booleans (several labels of
    a classifier) are the sequence's. Whole numbers, one a token, are next tokens where each is −100
    or the id of its own token, else classes of tokens, as are lists, one a token.
    """
    if not isinstance(labels, list) or len(labels) != len(ids):
        return "sequence"
    if any(isinstance(one, list) for one in labels):
        return "token"
    if not all(type(one) is int for one in labels):
        return "sequence"
    named = all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))
    return "next" if named else "token"


def kind_of_batch(labels: Sequence[Any], ids: Sequence[Sequence[int]]) -> str:
    """Which of :data:`KINDS` the labels of a batch are: those of one data set are of one kind.

    Classes of tokens may be the ids of the tokens by chance, in one sequence. And floats that are
    one a token in sequences of different lengths are the tokens'.
    """
    kinds = {kind_of(one, row) for one, row in zip(labels, ids, strict=True)}
    by_token = all(
        isinstance(one, list) and len(one) == len(row) for one, row in zip(labels, ids, strict=True)
    )
    if by_token and len({len(row) for row in ids}) > 1 and "sequence" in kinds:
        return "token"
    return next(kind for kind in ("sequence", "token", "next") if kind in kinds)


def check_kind(kind: str, labels: Sequence[Any], ids: Sequence[Sequence[int]]) -> None:
    """Raise ValueError where labels that were said to be one a token are not."""
    for one, row in zip(labels, ids, strict=True):
        if kind != "sequence" and (not isinstance(one, list) or len(one) != len(row)):
            given = f"{len(one)} labels" if isinstance(one, list) else repr(one)
            raise ValueError(
                f"with label_kind={kind!r} a sequence must have one label a token, got {given} for "
                f"{len(row)} tokens"
            )


def next_labels(ids: Sequence[int], mask: Sequence[int], prompt: int) -> list[int]:
    """Labels of a language model: −100 on the first ``prompt`` attended tokens and on what is not
    attended, the ids after."""
    labels, seen = [], 0
    for token, attended in zip(ids, mask, strict=True):
        seen += bool(attended)
        labels.append(token if attended and seen > prompt else IGNORED)
    return labels


def tokens_before(labels: Sequence[int] | None, mask: Sequence[int]) -> int:
    """Attended tokens before the first label that a loss counts; without labels all of them."""
    counted = (at for at, label in enumerate(labels or ()) if label != IGNORED)
    first = next(counted, len(mask))
    return sum(map(bool, mask[:first]))
