"""The rows of hidden states that an adapter edits in one forward.

Rows are indices into the flattened batch (B · S) of the forward's columns, −1 for none. They are
computed on the device; no value is read on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reft.adapter.sources import AdapterSource
from reft.model.prompts import ColumnRange, PromptSpans
from reft.positions import covered, end_numbers


@dataclass(frozen=True, eq=False)
class RowFinder:
    """Finds the rows of the adapters of one forward.

    Attributes:
        spans: the prompts of all sequences of the batch.
        chunk: the columns of the forward.
        given: the columns of the argument ``edit_positions``: bool, of the batch's shape, or int64
            (B, P), −1 for none. None without that argument.
        images: bool, of the batch's shape, the image tokens; None where no adapter edits them.
    """

    spans: PromptSpans
    chunk: ColumnRange
    given: Tensor | None = None
    images: Tensor | None = None

    def rows(self, adapter: AdapterSource, sequences: Tensor | None) -> tuple[Tensor, ...]:
        """The rows of an adapter, one int64 vector for each of its groups.

        Args:
            sequences: int64, the adapter's sequences; None for all.

        Raises:
            ValueError: the adapter has positions "given" and the call has no ``edit_positions``, or
                the call has them and the adapter has several groups.
        """
        kind = adapter.positions.kind
        if kind == "given" and self.given is None:
            raise ValueError(
                'edit_positions must be given: the adapter has positions "given", which every '
                "call has to name"
            )
        given = self.images if kind == "image" else self.given
        return edited_rows(adapter, self.spans, self.chunk, sequences=sequences, given=given)


def edited_rows(
    adapter: AdapterSource,
    spans: PromptSpans,
    chunk: ColumnRange,
    *,
    sequences: Tensor | None = None,
    given: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The rows that an adapter edits, one int64 vector for each of its groups.

    Args:
        spans: the prompts of all sequences of the batch.
        chunk: the columns of the forward.
        sequences: int64, the adapter's sequences; None for all.
        given: columns that replace the configuration's positions, see :class:`RowFinder`.

    Raises:
        ValueError: ``given`` for an adapter with a set of weights for each end of the prompt.
    """
    positions, config = adapter.positions, adapter.config
    if given is not None:
        if config.num_groups > 1:
            raise ValueError(
                f"edit_positions need one set of weights, and an adapter of {positions} with "
                f'tied=False, untied_by="{config.untied_by}" has {config.num_groups}'
            )
        return (_given_rows(given, spans, chunk, sequences).reshape(-1),)
    if positions.kind != "ends":
        return (_covered_rows(adapter, spans, chunk, sequences).reshape(-1),)
    selected = spans if sequences is None else spans.select(sequences)
    number, wanted = end_numbers(
        positions, selected.length.unsqueeze(1), config.short_prompts, config.prompt_end
    )
    index = selected.columns(number) - chunk.start
    index = torch.where(wanted & (index >= 0) & (index < chunk.seq_len), index, -1)
    rows = index if spans.packed else _flat_rows(index, sequences, chunk.seq_len)
    if config.tied:
        return (rows.reshape(-1),)
    if config.untied_by == "position":  # one group per column
        return tuple(column.reshape(-1) for column in rows.unbind(dim=1))
    if not (positions.first and positions.last):
        return (rows.reshape(-1),)
    return rows[:, : positions.first].reshape(-1), rows[:, positions.first :].reshape(-1)


def _covered_rows(
    adapter: AdapterSource, spans: PromptSpans, chunk: ColumnRange, sequences: Tensor | None
) -> Tensor:
    """Rows for positions of kind "prompt" or "all", which a token's number decides."""
    selected = spans if spans.packed or sequences is None else spans.select(sequences)
    number = selected.numbers(chunk)
    column = torch.arange(chunk.seq_len, device=number.device)
    if spans.packed:
        owner = spans.owner(chunk.seq_len)
        length: Tensor = spans.length[owner]
    else:
        length = selected.length.unsqueeze(1)
    wanted = covered(adapter.positions, number, length, adapter.config.prompt_end)
    if spans.packed:
        return torch.where(wanted & _is_owned(spans, owner, sequences), column, -1)
    return _flat_rows(torch.where(wanted, column, -1), sequences, chunk.seq_len)


def _given_rows(
    given: Tensor, spans: PromptSpans, chunk: ColumnRange, sequences: Tensor | None
) -> Tensor:
    """Rows for columns that the call names."""
    column = torch.arange(chunk.seq_len, device=given.device)
    if given.dtype != torch.bool:
        named = given if sequences is None else given[sequences]
        index = named - chunk.start
        inside = (named >= 0) & (index >= 0) & (index < chunk.seq_len)
        index = torch.where(inside, index, -1)
        return index if spans.packed else _flat_rows(index, sequences, chunk.seq_len)
    if spans.packed:
        owner = spans.owner(chunk.seq_len)
        wanted = given.reshape(-1) & _is_owned(spans, owner, sequences)
        return torch.where(wanted, column, -1)
    named = given if sequences is None else given[sequences]
    absolute = column + chunk.start
    inside = absolute < named.shape[1]
    wanted = named[:, absolute.clamp(max=named.shape[1] - 1)] & inside
    return _flat_rows(torch.where(wanted, column, -1), sequences, chunk.seq_len)


def _flat_rows(index: Tensor, sequences: Tensor | None, seq_len: int) -> Tensor:
    """Indices (B, P) into the columns of each sequence as rows of the flattened batch."""
    if sequences is None:
        sequences = torch.arange(index.shape[0], device=index.device)
    return torch.where(index < 0, index, index + sequences.unsqueeze(1) * seq_len)


def _is_owned(spans: PromptSpans, owner: Tensor, sequences: Tensor | None) -> Tensor | bool:
    """Whether each column of a packed batch belongs to one of the sequences."""
    if sequences is None:
        return True
    selected = torch.zeros_like(spans.length, dtype=torch.bool)
    return selected.index_fill(0, sequences, True)[owner]
