"""Kinds of labels: next tokens of a language model, classes of tokens, or labels of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reft.positions import IGNORED

#: "next": the ids of the tokens, which a language model predicts. "token": a class of each token.
#: "sequence": one or several labels of the whole sequence.
KINDS = ("next", "token", "sequence")


def as_numbers(value: Any) -> Any:
    """Convert tensors, arrays and sequences to lists; return a single number unchanged."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    is_flat = not value or type(value[0]) in (int, float, bool)
    return list(value) if is_flat else [as_numbers(element) for element in value]


def infer_kind(labels: Any, ids: Sequence[int]) -> str:
    """Return which of :data:`KINDS` the labels of a sequence are, from their values.

    A single number, a list whose length differs from the number of tokens, and floats or booleans
    (several labels of a classifier) are "sequence". One integer per token is "next" if each is −100
    or the id of its token, otherwise "token". One list per token is "token".
    """
    if not isinstance(labels, list) or len(labels) != len(ids):
        return "sequence"
    if any(isinstance(label, list) for label in labels):
        return "token"
    if not all(type(label) is int for label in labels):
        return "sequence"
    are_ids = all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))
    return "next" if are_ids else "token"


def infer_kind_of_batch(labels: Sequence[Any], ids: Sequence[Sequence[int]]) -> str:
    """Return which of :data:`KINDS` the labels of a batch are: all labels of a data set are of one
    kind.

    Classes of tokens may equal the token ids by chance in one sequence. One float per token, in
    sequences of different lengths, is "token".
    """
    kinds = {infer_kind(row, tokens) for row, tokens in zip(labels, ids, strict=True)}
    by_token = all(_is_by_token(row, tokens) for row, tokens in zip(labels, ids, strict=True))
    if by_token and len({len(tokens) for tokens in ids}) > 1 and "sequence" in kinds:
        return "token"
    return next(kind for kind in ("sequence", "token", "next") if kind in kinds)


def check_kind(kind: str, labels: Sequence[Any], ids: Sequence[Sequence[int]]) -> None:
    """Raise ValueError if ``kind`` needs one label per token and a sequence has another number."""
    for row, tokens in zip(labels, ids, strict=True):
        if kind != "sequence" and not _is_by_token(row, tokens):
            given = f"{len(row)} labels" if isinstance(row, list) else repr(row)
            raise ValueError(
                f"with label_kind={kind!r} a sequence must have one label per token, got {given} "
                f"for {len(tokens)} tokens"
            )


def _is_by_token(labels: Any, ids: Sequence[int]) -> bool:
    return isinstance(labels, list) and len(labels) == len(ids)


def next_token_labels(ids: Sequence[int], mask: Sequence[int], prompt_length: int) -> list[int]:
    """Return the labels of a language model: −100 on the first ``prompt_length`` attended tokens
    and on masked tokens, the ids on all others."""
    labels, attended_tokens = [], 0
    for token, attended in zip(ids, mask, strict=True):
        attended_tokens += bool(attended)
        labels.append(token if attended and attended_tokens > prompt_length else IGNORED)
    return labels


def count_prompt_tokens(labels: Sequence[int] | None, mask: Sequence[int]) -> int:
    """Return the number of attended tokens before the first label that is not −100, or of all
    attended tokens if there are no labels."""
    targets = (index for index, label in enumerate(labels or ()) if label != IGNORED)
    first = next(targets, len(mask))
    return sum(map(bool, mask[:first]))
