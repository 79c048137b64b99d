"""The argument ``edit_positions`` of a call: the tokens to edit instead of the configuration's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reft.model.prompts import INTEGERS, PromptSpans, visible

#: The token number that stands for no token.
_NO_TOKEN = torch.iinfo(torch.int64).min


def resolve_edit_positions(
    value: Any,
    ids: Tensor | None,
    attention_mask: Tensor | None,
    prompt: PromptSpans,
    shape: tuple[int, int],
) -> Tensor | None:
    """The columns of the argument ``edit_positions``; a function is called with the tokens.

    Returns:
        See :func:`given_columns`; None without the argument.
    """
    if callable(value):
        value = value(ids, attention_mask)
    return None if value is None else given_columns(value, prompt, shape)


def given_columns(value: Any, prompt: PromptSpans, shape: tuple[int, int]) -> Tensor:
    """Convert the argument ``edit_positions`` to columns of the batch.

    Args:
        value: a list of token numbers for each sequence, counted from its first token, or from the
            end of its prompt if negative; an integer tensor (B, P) of numbers, −1 for none; or a
            boolean tensor with one entry per column.
        prompt: the spans of the sequences.
        shape: of the batch.

    Returns:
        bool, ``shape``; or int64 (B, P), columns, −1 for none.

    Raises:
        TypeError: the value has another type or dtype.
        ValueError: its shape is wrong, or a number lies outside its sequence. Values on a device
            are not read.
    """
    device, batch = prompt.length.device, prompt.length.shape[0]
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        if tuple(value.shape) != shape:
            raise ValueError(
                f"a boolean edit_positions must have the shape of the batch, {shape}; got "
                f"{tuple(value.shape)}"
            )
        return value.to(device)
    numbers = _numbers(value, batch).to(device)
    length = prompt.length.unsqueeze(1)
    assert prompt.total is not None
    total = prompt.total.unsqueeze(1)
    missing = numbers == _NO_TOKEN
    number = torch.where(numbers < 0, numbers + length, numbers)
    inside = (number >= 0) & (number < total)
    if visible(numbers):
        wrong = ~(inside | missing)
        if bool(wrong.any()):
            row, index = (int(value) for value in wrong.nonzero()[0])
            raise ValueError(
                "edit_positions must be below the tokens of their sequence, or negative and within "
                f"its prompt; sequence {row} has {int(total[row, 0])} tokens, "
                f"{int(length[row, 0])} of them prompt, got {int(numbers[row, index])}"
            )
    columns = torch.where(inside & ~missing, prompt.columns(number), -1)
    # An edit takes each row once: a repeated column becomes −1.
    columns = columns.sort(dim=1).values
    columns[:, 1:] = torch.where(columns[:, 1:] == columns[:, :-1], -1, columns[:, 1:])
    return columns


def _numbers(value: Any, batch: int) -> Tensor:
    """Token numbers (batch, P), :data:`_NO_TOKEN` for none."""
    if isinstance(value, Tensor):
        if value.dtype not in INTEGERS:
            raise TypeError(f"edit_positions must be integers or booleans, got {value.dtype}")
        if value.ndim != 2 or value.shape[0] != batch:
            raise ValueError(
                f"edit_positions must be (sequences, tokens), {batch} sequences; got shape "
                f"{tuple(value.shape)}"
            )
        if visible(value) and value.numel() and int(value.min()) < -1:
            raise ValueError(
                "edit_positions in a tensor must be −1 (none) or at least 0, got "
                f"{int(value.min())}"
            )
        return torch.where(value < 0, _NO_TOKEN, value.long())
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    if not listed or not all(isinstance(row, Sequence) for row in value):
        raise TypeError(
            "edit_positions must be a list of token numbers for each sequence, a tensor, or a "
            f"function that returns one of these; got {value!r}"
        )
    if len(value) != batch:
        raise ValueError(
            f"edit_positions must have one list a sequence ({batch} of them), got {len(value)}"
        )
    for number in (number for row in value for number in row):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"edit_positions must be integers, got {number!r}")
    width = max((len(row) for row in value), default=0)
    rows = [[*row, *[_NO_TOKEN] * (width - len(row))] for row in value]
    return torch.tensor(rows, dtype=torch.int64).reshape(batch, width)
