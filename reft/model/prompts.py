"""Where the prompts of a batch lie: padded, or packed one after another into one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # the label of a token that is no target

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, eq=False)
class Prompt:
    """Where the prompts of B sequences lie. A prompt is its attended tokens: columns that the mask
    leaves out, before, inside or behind it, are not counted.

    Attributes:
        length: int64 (B,), number of its prompt tokens.
        start: int64 (B,), column of each sequence's first token; of packed sequences a column of
            the flattened batch. None for padded sequences with ``seen``, which tells it.
        total: int64 (B,), number of its tokens; None where nothing asks for it.
        packed: the sequences lie one after another, so that a column is a row already.
        seen: int64, the number of attended tokens up to and with each column: (B, W) of padded
            sequences, behind whose W columns every one is attended; (N,) of the N columns of a
            packed batch. None where every column from ``start`` on is attended.
        before: int64 (B,), of packed sequences with ``seen``, the tokens of earlier sequences.
    """

    start: Tensor | None
    length: Tensor
    total: Tensor | None = None
    packed: bool = False
    seen: Tensor | None = None
    before: Tensor | None = None

    def select(self, sequences: Tensor | None) -> Prompt:
        """The prompts of some sequences, in that order; None for all."""
        return self if sequences is None else self._each(lambda part: part[sequences])

    def expand(self, batch: int) -> Prompt:
        """Each sequence repeated, as beam search and several returned sequences repeat them.

        Raises:
            ValueError: ``batch`` is no multiple of the number of prompts.
        """
        sequences = self.length.shape[0]
        if batch == sequences:
            return self
        if sequences == 0 or batch % sequences:
            raise ValueError(f"a batch of {batch} sequences cannot come from {sequences} prompts")
        return self._each(lambda part: part.repeat_interleave(batch // sequences, dim=0))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Prompt:
        def changed(part: Tensor | None) -> Tensor | None:
            return None if part is None else change(part)

        return replace(
            self,
            start=changed(self.start),
            length=change(self.length),
            total=changed(self.total),
            seen=self.seen if self.packed else changed(self.seen),
            before=changed(self.before),
        )

    def owner(self, columns: int) -> Tensor:
        """Of packed sequences: int64 (columns,), which one each column belongs to."""
        assert self.start is not None
        column = torch.arange(columns, device=self.start.device)
        return torch.searchsorted(self.start, column, right=True) - 1

    def columns(self, numbers: Tensor) -> Tensor:
        """The columns of tokens.

        Args:
            numbers: int64 (B, P), tokens of each sequence counted from 0. A number that is none of
                its tokens gives a column without meaning.
        """
        if self.seen is None:
            assert self.start is not None
            return self.start.unsqueeze(1) + numbers
        if self.before is not None:
            numbers = numbers + self.before.unsqueeze(1)
        # The first column up to which one token more was seen.
        return torch.searchsorted(self.seen, numbers + 1)

    def numbers(self, window_start: int | Tensor, window: int) -> Tensor:
        """Which token of its sequence stands in each column, counted from 0; negative for none.

        Args:
            window_start: the first column; 0 for a packed batch.
            window: S, the number of columns.

        Returns:
            int64 (B, S), or (S,) for a packed batch.
        """
        column = torch.arange(window, device=self.length.device)
        if self.packed:
            owner = self.owner(window)
            if self.seen is None:
                assert self.start is not None
                return column - self.start[owner]
            assert self.before is not None
            return _counted(self.seen, self.seen - self.before[owner])
        column = column + window_start
        if self.seen is None:
            assert self.start is not None
            return column - self.start.unsqueeze(1)
        width = self.seen.shape[1]
        number = _counted(self.seen, self.seen)
        behind = self.seen[:, -1:] + (column - width)
        there = number[:, column.clamp(max=width - 1)]
        return torch.where(column < width, there, behind)


def _counted(seen: Tensor, upto: Tensor) -> Tensor:
    """``upto`` − 1 where ``seen`` grows, in its last dimension, else −1."""
    grows = seen.diff(dim=-1, prepend=torch.zeros_like(seen[..., :1])) > 0
    return torch.where(grows, upto - 1, -1)


def find_prompt(
    batch: int,
    columns: int,
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    prompt_lengths: Tensor | Sequence[int] | None = None,
    shifted: bool = False,
) -> Prompt:
    """The prompt of each sequence of a padded batch.

    Its length is ``prompt_lengths`` if given, else the number of attended tokens before the first
    label that is not −100, else of all attended tokens.

    Args:
        batch: B.
        columns: S, columns of the padded batch, those in the cache included.
        device: where the answer is wanted.
        attention_mask: (B, S), nonzero where attended; None for everywhere.
        labels: (B, S).
        prompt_lengths: int (B,).
        shifted: a label is the token after its column, as in the decoder of an encoder–decoder, and
            not the token in it.

    Raises:
        TypeError, ValueError: a wrong shape or dtype; a length that is negative or longer than the
            sequence, where the host can see that without waiting for a device.
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
            "prompt_lengths need an attention_mask of (batch, columns), to know where a prompt "
            f"starts; got shape {tuple(attention_mask.shape)}"
        )
    else:
        raise ValueError(
            "attention_mask must be (batch, columns) to tell the prompt; got shape "
            f"{tuple(attention_mask.shape)}. Generate with ReftModel.generate, which remembers it"
        )
    if prompt_lengths is not None:
        return Prompt(start, _checked_lengths(prompt_lengths, batch, total), total, seen=seen)
    if labels is None:
        return Prompt(start, total, total, seen=seen)
    shape = (batch, columns) if attended is None else tuple(attended.shape)
    if tuple(labels.shape) != shape:
        raise ValueError(
            f"labels must have the shape of the batch, {shape}, to tell the prompt; got "
            f"{tuple(labels.shape)}"
        )
    # Before the first target: no target so far.
    before = (labels.to(device) != IGNORED).cumsum(dim=1) == 0
    length = (before if attended is None else attended & before).sum(dim=1)
    return Prompt(start, torch.minimum(length + 1, total) if shifted else length, total, seen=seen)


def find_packed_prompt(
    starts: Tensor,
    columns: int,
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    prompt_lengths: Tensor | Sequence[int] | None = None,
) -> Prompt:
    """The prompt of each sequence of a packed batch, told as in :func:`find_prompt`.

    Args:
        starts: int64 (B,), ascending, the first column of each sequence in the flattened batch.
        columns: N, its columns.
        attention_mask: N entries, any shape, nonzero where attended; None for everywhere.
        labels: N of them, any shape.
        prompt_lengths: int (B,), one a sequence.

    Raises:
        TypeError, ValueError: as :func:`find_prompt`.
    """
    ends = torch.cat([starts[1:], torch.full_like(starts[:1], columns)])
    attended = None
    if attention_mask is not None and attention_mask.numel() == columns:
        attended = attention_mask.to(starts.device).reshape(-1).bool()
        seen = attended.cumsum(dim=0)
        before = (seen - attended.long())[starts]
        total = seen[ends - 1] - before
        prompt = Prompt(starts, total, total, packed=True, seen=seen, before=before)
    else:
        total = ends - starts
        prompt = Prompt(starts, total, total, packed=True)
    if prompt_lengths is not None:
        lengths = _checked_lengths(prompt_lengths, starts.shape[0], total)
        return replace(prompt, length=lengths)
    if labels is None:
        return prompt
    if labels.numel() != columns:
        raise ValueError(
            f"labels must be one a token, {columns} of them, to tell the prompts; got shape "
            f"{tuple(labels.shape)}"
        )
    targets = (labels.to(starts.device).reshape(-1) != IGNORED).long()
    targeted = targets.cumsum(0)
    # Targets before each sequence; a token is before the first of its own if it saw no more.
    earlier = (targeted - targets)[starts]
    untargeted = targeted == earlier[prompt.owner(columns)]
    counted = (untargeted if attended is None else untargeted & attended).long().cumsum(0)
    upto = torch.cat([counted.new_zeros(1), counted])
    return replace(prompt, length=upto[ends] - upto[starts])


#: What a forward calls a cache of another kind than transformers' own.
_CACHES = ("past_key_values", "cache_params")


def cache_of(call: Mapping[str, Any]) -> Any:
    """The cache that a forward was given, or None. It is known by what it can do, whatever it is
    called: transformers 5.24 changed the name."""
    for value in call.values():
        if hasattr(value, "get_seq_length"):
            return value
    for name in _CACHES:
        if call.get(name) is not None:
            return call[name]
    return None


def packed_starts(call: dict[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """Where the sequences of a packed batch start, int64 (B,) into the flattened batch; None if the
    batch is a padded one.

    ``cu_seq_lens_q`` says it. Else, as for transformers itself, a batch without an attention mask
    and without a cache is packed where its ``position_ids`` do not just go on. How many sequences
    they hold is read from the device, which ``cu_seq_lens_q`` spares.

    Raises:
        ValueError: while compiling, ``position_ids`` alone.
    """
    bounds: Tensor | None = call.get("cu_seq_lens_q")
    if bounds is not None:
        return bounds[:-1].long()
    position = call.get("position_ids")
    if not isinstance(position, Tensor) or tuple(position.shape) != shape:
        return None
    if call.get("attention_mask") is not None or cache_of(call) is not None:
        return None
    if torch.compiler.is_compiling():
        raise ValueError(
            "position_ids do not tell a compiled forward how many sequences are packed in a row: "
            "give cu_seq_lens_q too, or an attention_mask if there is one in each row"
        )
    jump = torch.ones_like(position, dtype=torch.bool)
    jump[:, 1:] = position.diff(dim=1) != 1
    starts = jump.reshape(-1).nonzero().reshape(-1)
    return starts if starts.shape[0] != shape[0] else None


def image_token(model: nn.Module) -> int | None:
    """The id that stands for a piece of an image among a model's tokens, None if there is none."""
    config = getattr(model, "config", None)
    ids = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((one for one in ids if isinstance(one, int)), None)


def _checked_lengths(values: Tensor | Sequence[int], batch: int, total: Tensor) -> Tensor:
    lengths = values if isinstance(values, Tensor) else torch.tensor(values)
    if lengths.dtype not in INTEGERS:
        raise TypeError(f"prompt_lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(
            f"prompt_lengths must have one entry a sequence, shape ({batch},); "
            f"got {tuple(lengths.shape)}"
        )
    if batch and visible(lengths) and total.device.type == "cpu":
        wrong = (lengths < 0) | (lengths > total)
        if bool(wrong.any()):
            at = int(wrong.int().argmax())
            raise ValueError(
                f"prompt_lengths must lie in 0 … the attended tokens of each sequence; sequence "
                f"{at} has {int(total[at])}, got {int(lengths[at])}"
            )
    return lengths.to(total.device, torch.int64)


def visible(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device or breaking a traced graph."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu"
