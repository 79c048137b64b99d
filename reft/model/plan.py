"""The plan of one forward: where the prompt lies, which rows are edited, with which weights.

It is made once, on the device, before the first block runs, and shared by all blocks. No value is
read on the host. It holds the effective weights of its forward too, so that a block that is run a
second time, in backward, uses those of its own forward and of no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from reft.config import ReftConfig
from reft.nn.bank import Bank, Effective
from reft.positions import padded_positions
from reft_kernels import RowPlan

IGNORED = -100  # the label of a token that is no target


@dataclass(frozen=True, eq=False)
class Prompt:
    """Where the prompts lie in a padded batch.

    Attributes:
        start: int64 (B,), column of each sequence's first attended token.
        length: int64 (B,), number of its prompt tokens.
    """

    start: Tensor
    length: Tensor

    def select(self, sequences: Tensor | None) -> Prompt:
        """The prompts of some sequences, in that order; None for all."""
        if sequences is None:
            return self
        return Prompt(self.start[sequences], self.length[sequences])

    def expand(self, batch: int) -> Prompt:
        """Each sequence repeated, as beam search and several returned sequences repeat them.

        Raises:
            ValueError: ``batch`` is no multiple of the number of prompts.
        """
        own = self.start.shape[0]
        if batch == own:
            return self
        if own == 0 or batch % own:
            raise ValueError(f"a batch of {batch} sequences cannot come from {own} prompts")
        times = batch // own
        return Prompt(self.start.repeat_interleave(times), self.length.repeat_interleave(times))


def find_prompt(
    batch: int,
    columns: int,
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    prompt_lengths: Tensor | Sequence[int] | None = None,
) -> Prompt:
    """The prompt of each sequence.

    Its length is ``prompt_lengths`` if given, else the number of attended tokens before the first
    label that is not −100, else of all attended tokens.

    Args:
        batch: B.
        columns: S, columns of the padded batch, those in the cache included.
        device: where the answer is wanted.
        attention_mask: (B, S), nonzero where attended; None for everywhere.
        labels: (B, S).
        prompt_lengths: int (B,).

    Raises:
        TypeError, ValueError: a wrong shape or dtype; a length that is negative or longer than the
            sequence, where the host can see that without waiting for a device.
    """
    if attention_mask is None:
        attended = torch.ones(batch, columns, dtype=torch.bool, device=device)
    elif attention_mask.ndim == 2:
        attended = attention_mask.to(device).bool()
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
    start = attended.int().argmax(dim=1)
    total = attended.sum(dim=1)
    if prompt_lengths is not None:
        return Prompt(start, _checked_lengths(prompt_lengths, batch, total))
    if labels is None:
        return Prompt(start, total)
    if labels.shape != attended.shape:
        raise ValueError(
            f"labels must have the shape of the batch, {tuple(attended.shape)}, to tell the "
            f"prompt; got {tuple(labels.shape)}"
        )
    # Before the first target: no target so far.
    before = (labels.to(device) != IGNORED).cumsum(dim=1) == 0
    return Prompt(start, (attended & before).sum(dim=1))


def _checked_lengths(values: Tensor | Sequence[int], batch: int, total: Tensor) -> Tensor:
    lengths = values if isinstance(values, Tensor) else torch.tensor(values)
    if lengths.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"prompt_lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(
            f"prompt_lengths must have one entry a sequence, shape ({batch},); "
            f"got {tuple(lengths.shape)}"
        )
    visible = not torch.compiler.is_compiling() and lengths.device.type == "cpu"
    if visible and batch and total.device.type == "cpu":
        wrong = (lengths < 0) | (lengths > total)
        if bool(wrong.any()):
            at = int(wrong.int().argmax())
            raise ValueError(
                f"prompt_lengths must lie in 0 … the attended tokens of each sequence; sequence "
                f"{at} has {int(total[at])}, got {int(lengths[at])}"
            )
    return lengths.to(total.device, torch.int64)


@dataclass(frozen=True, eq=False)
class Edit:
    """One call of the operator: rows, weights (g, r, D), bias (g, r), and how."""

    rows: RowPlan
    encode: Tensor | None
    bias: Tensor
    decode: Tensor
    subtract: bool
    activation: str | None
    dropout: float
    dropout_on: str


@dataclass(frozen=True, eq=False)
class Member:
    """One adapter in a forward.

    Attributes:
        bank: its parameters.
        rows: int64 (n,) rows of each of its groups, −1 for none, into the flattened window.
        dropout: probability that is in force, 0.0 in eval mode.
    """

    bank: Bank
    rows: tuple[Tensor, ...]
    dropout: float


def member_rows(
    config: ReftConfig,
    prompt: Prompt,
    *,
    window_start: int | Tensor,
    window: int,
    sequences: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The rows that an adapter edits in this forward, one vector for each of its groups.

    Args:
        config: of the adapter.
        prompt: of all sequences of the batch.
        window_start: columns that are in the cache already.
        window: S, columns of this forward.
        sequences: which sequences are the adapter's; None for all.
    """
    positions = config.parsed_positions
    mine = prompt.select(sequences)
    places = padded_positions(
        positions,
        mine.start,
        mine.length,
        window_start=window_start,
        window=window,
        short_prompts=config.short_prompts,
        prompt_end=config.prompt_end,
    )
    if sequences is None:
        sequences = torch.arange(places.shape[0], device=places.device)
    rows = torch.where(places < 0, places, places + sequences.unsqueeze(1) * window)
    if config.num_groups == 1:
        return (rows.reshape(-1),)
    # Untied: prefix columns are group 0, suffix columns group 1, and groups lie one after the
    # other.
    first = positions.first
    return rows[:, :first].reshape(-1), rows[:, first:].reshape(-1)


class ForwardPlan:
    """What one forward edits.

    Attributes:
        shape: (B, S) of the window.
        edits: block number -> the edits of its output, usually one.
        recorded: whether gradients were recorded when it was made.
        replayed: set by a hook that saw the first run of a checkpointed region without gradients;
            the second run then needs weights with a graph of its own, see :meth:`again`.
    """

    def __init__(self, members: Sequence[Member], shape: tuple[int, int]) -> None:
        self.members, self.shape = tuple(members), shape
        self.edits = _assemble(self.members)
        self.recorded = torch.is_grad_enabled()
        self.replayed = False

    def again(self) -> ForwardPlan:
        """The same rows with freshly computed weights. The same numbers: no optimizer steps
        between a forward and its backward."""
        return ForwardPlan(self.members, self.shape)


def _assemble(members: tuple[Member, ...]) -> dict[int, tuple[Edit, ...]]:
    effective = [member.bank() for member in members]
    by_layer: dict[int, list[int]] = {}
    for index, member in enumerate(members):
        for layer in member.bank.layers:
            by_layer.setdefault(layer, []).append(index)
    plans: dict[tuple[int, ...], RowPlan] = {}
    edits: dict[int, tuple[Edit, ...]] = {}
    for layer, present in by_layer.items():
        # Adapters whose edits have one form go into one call, as groups of it.
        kinds: dict[tuple[bool, str | None, float, str], list[int]] = {}
        for index in present:
            form, member = effective[index], members[index]
            kind = (form.subtract, form.activation, member.dropout, member.bank.config.dropout_on)
            kinds.setdefault(kind, []).append(index)
        calls = []
        for kind, chosen in kinds.items():
            key = tuple(chosen)
            if key not in plans:
                plans[key] = _row_plan([rows for index in chosen for rows in members[index].rows])
            places = [members[index].bank.layers.index(layer) for index in chosen]
            encode, bias, decode = _stack([effective[index] for index in chosen], places)
            subtract, activation, dropout, dropout_on = kind
            calls.append(
                Edit(plans[key], encode, bias, decode, subtract, activation, dropout, dropout_on)
            )
        edits[layer] = tuple(calls)
    return edits


def _row_plan(groups: list[Tensor]) -> RowPlan:
    if len(groups) == 1:
        return RowPlan.from_rows(groups[0])
    return RowPlan(torch.cat(groups), (0, *accumulate(rows.shape[0] for rows in groups)))


def _stack(forms: list[Effective], places: list[int]) -> tuple[Tensor | None, Tensor, Tensor]:
    """A, b and R of one layer over all groups of several adapters, ranks padded with zeros: a row
    of zeros in R adds nothing, whatever code stands before it."""
    bias = [form.bias[place] for form, place in zip(forms, places, strict=True)]
    decode = [form.decode[place] for form, place in zip(forms, places, strict=True)]
    encode = [
        None if form.encode is None else form.encode[place]
        for form, place in zip(forms, places, strict=True)
    ]
    if len(forms) == 1:
        return encode[0], bias[0], decode[0]
    rank = max(part.shape[1] for part in decode)
    wide = decode[0].dtype
    for part in decode[1:]:
        wide = torch.promote_types(wide, part.dtype)

    def padded(part: Tensor) -> Tensor:
        missing = rank - part.shape[1]
        return F.pad(part.to(wide), (0, missing) if part.ndim == 2 else (0, 0, 0, missing))

    joined = None
    if any(part is not None for part in encode):
        joined = torch.cat(
            [
                padded(torch.zeros_like(decode[i]) if part is None else part)
                for i, part in enumerate(encode)
            ]
        )
    return (
        joined,
        torch.cat([padded(part) for part in bias]),
        torch.cat([padded(p) for p in decode]),
    )
