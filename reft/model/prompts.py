"""The spans of the prompts of a batch, padded or packed one behind another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reft.positions import IGNORED

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class ColumnRange(NamedTuple):
    """Columns of a padded batch that one forward computes.

    Attributes:
        start: the first column: the length of the cache. A 0-dim tensor where the cache keeps it
            on the device.
        seq_len: S, the number of columns; for a packed batch of all its rows.
    """

    start: int | Tensor
    seq_len: int


@dataclass(frozen=True, eq=False)
class PromptSpans:
    """The spans of the prompts of B sequences.

    A prompt consists of its attended tokens: columns that the mask leaves out, before, inside or
    behind the prompt, are not counted.

    Attributes:
        start: int64 (B,), column of each sequence's first token, for packed sequences a column of
            the flattened batch. None for padded sequences with ``seen``, which holds it.
        length: int64 (B,), prompt tokens of each sequence.
        total: int64 (B,), tokens of each sequence; None where nothing needs it.
        packed: the sequences lie one behind another, so that a column is a row already.
        seen: int64, attended tokens up to and including each column: (B, W) for padded sequences,
            where every column behind W is attended; (N,) for the N columns of a packed batch. None
            where every column from ``start`` on is attended.
        before: int64 (B,), tokens of earlier sequences, for packed sequences with ``seen``.
    """

    start: Tensor | None
    length: Tensor
    total: Tensor | None = None
    packed: bool = False
    seen: Tensor | None = None
    before: Tensor | None = None

    def select(self, sequences: Tensor) -> PromptSpans:
        """The spans of some sequences, in that order."""
        return self._each(lambda values: values[sequences])

    def expand(self, batch: int) -> PromptSpans:
        """Repeat each sequence as beam search and ``num_return_sequences`` do.

        Raises:
            ValueError: ``batch`` is not a multiple of the number of prompts.
        """
        sequences = self.length.shape[0]
        if batch == sequences:
            return self
        if sequences == 0 or batch % sequences:
            raise ValueError(f"a batch of {batch} sequences cannot come from {sequences} prompts")
        return self._each(lambda values: values.repeat_interleave(batch // sequences, dim=0))

    def _each(self, change: Callable[[Tensor], Tensor]) -> PromptSpans:
        def changed(values: Tensor | None) -> Tensor | None:
            return None if values is None else change(values)

        return replace(
            self,
            start=changed(self.start),
            length=change(self.length),
            total=changed(self.total),
            seen=self.seen if self.packed else changed(self.seen),
            before=changed(self.before),
        )

    def owner(self, columns: int) -> Tensor:
        """The sequence that each column of a packed batch belongs to, int64 (columns,)."""
        assert self.start is not None
        column = torch.arange(columns, device=self.start.device)
        return torch.searchsorted(self.start, column, right=True) - 1

    def columns(self, numbers: Tensor) -> Tensor:
        """The columns of tokens.

        Args:
            numbers: int64 (B, P), tokens of each sequence counted from 0. A number outside the
                sequence gives an undefined column.
        """
        if self.seen is None:
            assert self.start is not None
            return self.start.unsqueeze(1) + numbers
        if self.before is not None:
            numbers = numbers + self.before.unsqueeze(1)
        # The first column that has seen one token more.
        return torch.searchsorted(self.seen, numbers + 1)

    def numbers(self, chunk: ColumnRange) -> Tensor:
        """The number of each column's token in its sequence, from 0; negative for no token.

        Args:
            chunk: the columns; all of them for a packed batch.

        Returns:
            int64 (B, S), or (S,) for a packed batch.
        """
        start, seq_len = chunk
        column = torch.arange(seq_len, device=self.length.device)
        if self.packed:
            owner = self.owner(seq_len)
            if self.seen is None:
                assert self.start is not None
                return column - self.start[owner]
            assert self.before is not None
            return _counted(self.seen, self.seen - self.before[owner])
        column = column + start
        if self.seen is None:
            assert self.start is not None
            return column - self.start.unsqueeze(1)
        width = self.seen.shape[1]
        number = _counted(self.seen, self.seen)
        behind = self.seen[:, -1:] + (column - width)
        inside = number[:, column.clamp(max=width - 1)]
        return torch.where(column < width, inside, behind)


def _counted(seen: Tensor, count: Tensor) -> Tensor:
    """``count`` − 1 where ``seen`` grows along its last dimension, else −1."""
    grows = seen.diff(dim=-1, prepend=torch.zeros_like(seen[..., :1])) > 0
    return torch.where(grows, count - 1, -1)


def find_prompt(
    batch: int,
    columns: int,
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    prompt_lengths: Tensor | Sequence[int] | None = None,
    shifted: bool = False,
) -> PromptSpans:
    """Find the prompt of each sequence of a padded batch.

    Its length is ``prompt_lengths`` if given. Otherwise it is the number of attended tokens before
    the first label that is not −100, or of all attended tokens.

    Args:
        batch: B.
        columns: S, columns of the padded batch, including those in the cache.
        device: device of the result.
        attention_mask: (B, S), nonzero where attended; None for everywhere.
        labels: (B, S).
        prompt_lengths: int (B,).
        shifted: the label of a column is the next token, as in the decoder of an encoder–decoder,
            not the token in it.

    Raises:
        TypeError: the dtype of ``prompt_lengths`` is wrong.
        ValueError: a shape is wrong, or a length lies outside its sequence. Values on a device are
            not read.
    """
    seen = attended = None
    if attention_mask is None or attention_mask.shape[1:] == (0,):
        start = torch.zeros(batch, dtype=torch.int64, device=device)
        total = torch.full_like(start, columns)
    elif attention_mask.ndim == 2:
        attended = attention_mask.to(device).bool()
        seen = attended.cumsum(dim=1)
        start, total = None, seen[:, -1]
    elif prompt_lengths is not None:
        raise ValueError(
            "prompt_lengths need an attention_mask of (batch, columns), which shows where a prompt "
            f"starts; got shape {tuple(attention_mask.shape)}"
        )
    else:
        raise ValueError(
            "attention_mask must be (batch, columns) to show the prompt; got shape "
            f"{tuple(attention_mask.shape)}. Use ReftModel.generate, which remembers the prompt"
        )
    if prompt_lengths is not None:
        return PromptSpans(start, _checked_lengths(prompt_lengths, batch, total), total, seen=seen)
    if labels is None:
        return PromptSpans(start, total, total, seen=seen)
    shape = (batch, columns) if attended is None else tuple(attended.shape)
    if tuple(labels.shape) != shape:
        raise ValueError(
            f"labels must have the shape of the batch, {shape}, to show the prompt; got "
            f"{tuple(labels.shape)}"
        )
    # A column lies before the first target if no target was seen so far.
    before = (labels.to(device) != IGNORED).cumsum(dim=1) == 0
    length = (before if attended is None else attended & before).sum(dim=1)
    return PromptSpans(
        start, torch.minimum(length + 1, total) if shifted else length, total, seen=seen
    )


def find_packed_prompt(
    starts: Tensor,
    columns: int,
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    prompt_lengths: Tensor | Sequence[int] | None = None,
) -> PromptSpans:
    """Find the prompt of each sequence of a packed batch, by the rule of :func:`find_prompt`.

    Args:
        starts: int64 (B,), ascending, the first column of each sequence in the flattened batch.
        columns: N, columns of the flattened batch.
        attention_mask: N entries of any shape, nonzero where attended; None for everywhere.
        labels: N entries of any shape.
        prompt_lengths: int (B,), one per sequence.

    Raises:
        TypeError, ValueError: see :func:`find_prompt`.
    """
    ends = torch.cat([starts[1:], torch.full_like(starts[:1], columns)])
    attended = None
    if attention_mask is not None and attention_mask.numel() == columns:
        attended = attention_mask.to(starts.device).reshape(-1).bool()
        seen = attended.cumsum(dim=0)
        before = (seen - attended.long())[starts]
        total = seen[ends - 1] - before
        prompt = PromptSpans(starts, total, total, packed=True, seen=seen, before=before)
    else:
        total = ends - starts
        prompt = PromptSpans(starts, total, total, packed=True)
    if prompt_lengths is not None:
        lengths = _checked_lengths(prompt_lengths, starts.shape[0], total)
        return replace(prompt, length=lengths)
    if labels is None:
        return prompt
    if labels.numel() != columns:
        raise ValueError(
            f"labels must be one per token, {columns} of them, to show the prompts; got shape "
            f"{tuple(labels.shape)}"
        )
    targets = (labels.to(starts.device).reshape(-1) != IGNORED).long()
    targeted = targets.cumsum(0)
    # A token lies before the first target of its sequence if no more targets were seen than
    # earlier sequences have.
    earlier = (targeted - targets)[starts]
    untargeted = targeted == earlier[prompt.owner(columns)]
    counted = (untargeted if attended is None else untargeted & attended).long().cumsum(0)
    upto = torch.cat([counted.new_zeros(1), counted])
    return replace(prompt, length=upto[ends] - upto[starts])


def image_token(model: nn.Module) -> int | None:
    """The token id of a model's image patches; None if it has no such token."""
    config = getattr(model, "config", None)
    ids = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((token for token in ids if isinstance(token, int)), None)


def _checked_lengths(values: Tensor | Sequence[int], batch: int, total: Tensor) -> Tensor:
    lengths = values if isinstance(values, Tensor) else torch.tensor(values)
    if lengths.dtype not in INTEGERS:
        raise TypeError(f"prompt_lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(
            f"prompt_lengths must have one entry per sequence, shape ({batch},); "
            f"got {tuple(lengths.shape)}"
        )
    if batch and visible(lengths) and total.device.type == "cpu":
        wrong = (lengths < 0) | (lengths > total)
        if bool(wrong.any()):
            index = int(wrong.int().argmax())
            raise ValueError(
                f"prompt_lengths must be from 0 to the attended tokens of each sequence; sequence "
                f"{index} has {int(total[index])}, got {int(lengths[index])}"
            )
    return lengths.to(total.device, torch.int64)


def visible(tensor: Tensor) -> bool:
    """Whether the host can read values without waiting for a device or breaking a graph."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu"
