"""The argument ``edit_positions`` of a call: tokens that are edited instead of those of the
configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reft.model.prompts import INTEGERS, Prompt, visible

#: Among token numbers: no token.
_NONE = torch.iinfo(torch.int64).min


def given_columns(value: Any, prompt: Prompt, shape: tuple[int, int]) -> Tensor:
    """The argument ``edit_positions`` as what :func:`reft.model.forward_plan.member_rows` reads.

    Args:
        value: a list of token numbers for each sequence, counted from its first token, a negative
            one from the end of its prompt; an integer tensor (B, P) of numbers, −1 for none; or a
            boolean tensor, one entry a column.
        prompt: where the sequences lie.
        shape: of the batch.

    Returns:
        bool, ``shape``; or int64 (B, P), columns, −1 for none.

    Raises:
        TypeError, ValueError: none of these, a wrong shape, a number outside its sequence where the
            host can see that without waiting for a device.
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
    absent = numbers == _NONE
    number = torch.where(numbers < 0, numbers + length, numbers)
    inside = (number >= 0) & (number < total)
    if visible(numbers):
        wrong = ~(inside | absent)
        if bool(wrong.any()):
            row, at = (int(one) for one in wrong.nonzero()[0])
            raise ValueError(
                "edit_positions must be below the tokens of their sequence, or negative and within "
                f"its prompt; sequence {row} has {int(total[row, 0])} tokens, "
                f"{int(length[row, 0])} of them prompt, got {int(numbers[row, at])}"
            )
    columns = torch.where(inside & ~absent, prompt.columns(number), -1)
    # Each row of hidden states at most once: neighbours that are equal are one.
    columns = columns.sort(dim=1).values
    columns[:, 1:] = torch.where(columns[:, 1:] == columns[:, :-1], -1, columns[:, 1:])
    return columns


def _numbers(value: Any, batch: int) -> Tensor:
    """Token numbers (batch, P), :data:`_NONE` for none."""
    if isinstance(value, Tensor):
        if value.dtype not in INTEGERS:
            raise TypeError(f"edit_positions must be integers or booleans, got {value.dtype}")
        if value.ndim != 2 or value.shape[0] != batch:
            raise ValueError(
                f"edit_positions must be (sequences, places), {batch} sequences; got shape "
                f"{tuple(value.shape)}"
            )
        if visible(value) and value.numel() and int(value.min()) < -1:
            raise ValueError(
                "edit_positions in a tensor must be −1 (none) or at least 0, got "
                f"{int(value.min())}"
            )
        return torch.where(value < 0, _NONE, value.long())
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
    for number in (one for row in value for one in row):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"edit_positions must be integers, got {number!r}")
    width = max((len(row) for row in value), default=0)
    rows = [[*row, *[_NONE] * (width - len(row))] for row in value]
    return torch.tensor(rows, dtype=torch.int64).reshape(batch, width)
