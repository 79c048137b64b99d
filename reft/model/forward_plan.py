"""The plan of one forward: which rows are edited, with which weights.

It is made once, on the device, before the first block runs, and shared by all blocks. No value is
read on the host. It holds the effective weights of its forward too, so that a block that is run a
second time, in backward, uses those of its own forward and of no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from reft.adapter.device_cache import EditSite, Lease
from reft.adapter.edit_weights import concatenate, mask_ranks, scale
from reft.adapter.multi_device import MultiDeviceParameters
from reft.adapter.parameters import AdapterParameters
from reft.config import ReftConfig
from reft.model.prompts import Prompt
from reft.positions import covered, end_numbers
from reft_kernels import RowPlan
from reft_kernels.spec import EditWeights


@dataclass(frozen=True, eq=False)
class Edit:
    """One call of the operator.

    Attributes:
        rows: the edited rows.
        weights: A, b and R of the groups of the rows.
        dropout: probability of dropout of the edit.
        dropout_on: "delta" or "row", see :func:`reft.model.dropout.dropped_edit`.
        lease: keeps the weights as they are meanwhile, where they are slots of a cache.
    """

    rows: RowPlan
    weights: EditWeights
    dropout: float = 0.0
    dropout_on: str = "delta"
    lease: Lease | None = None


@dataclass(frozen=True, eq=False)
class Member:
    """One adapter in a forward.

    Attributes:
        bank: its parameters.
        rows: int64 (n,) rows of each of its groups, −1 for none, into the flattened window.
        dropout: probability that is in force, 0.0 in eval mode.
        kept: bool (r,), the directions that are edited; None for all.
        scale: what its edit is multiplied by.
    """

    adapter: AdapterParameters | MultiDeviceParameters
    rows: tuple[Tensor, ...]
    dropout: float
    kept: Tensor | None = None
    scale: float = 1.0


def member_rows(
    config: ReftConfig,
    prompt: Prompt,
    *,
    window_start: int | Tensor,
    window: int,
    sequences: Tensor | None = None,
    chosen: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The rows that an adapter edits in this forward, one vector for each of its groups.

    Args:
        config: of the adapter.
        prompt: of all sequences of the batch.
        window_start: columns that are in the cache already.
        window: S, columns of this forward; of a packed batch all its rows.
        sequences: which sequences are the adapter's; None for all.
        chosen: columns that are edited instead of those that the configuration says: bool, of the
            batch's shape, or int64 (B, P), −1 for none.

    Raises:
        ValueError: ``chosen`` for an adapter with a set of weights for each end of the prompt.
    """
    positions = config.parsed_positions
    if chosen is not None:
        if config.num_groups > 1:
            raise ValueError(
                f"edit_positions need one set of weights, and an adapter of {positions} with "
                f'tied=False, untied_by="{config.untied_by}" has {config.num_groups}'
            )
        return (_chosen_rows(chosen, prompt, window_start, window, sequences).reshape(-1),)
    if positions.kind != "ends":
        return (_counted_rows(config, prompt, window_start, window, sequences).reshape(-1),)
    mine = prompt.select(sequences)
    number, wanted = end_numbers(
        positions, mine.length.unsqueeze(1), config.short_prompts, config.prompt_end
    )
    places = mine.columns(number) - window_start
    places = torch.where(wanted & (places >= 0) & (places < window), places, -1)
    rows = places if prompt.packed else _in_batch(places, sequences, window)
    if config.num_groups == 1:
        return (rows.reshape(-1),)
    # Untied: a group for each column, or one for prefix and one for suffix columns; groups lie one
    # after the other.
    if config.untied_by == "position":
        return tuple(column.reshape(-1) for column in rows.unbind(dim=1))
    first = positions.first
    return rows[:, :first].reshape(-1), rows[:, first:].reshape(-1)


def _counted_rows(
    config: ReftConfig,
    prompt: Prompt,
    window_start: int | Tensor,
    window: int,
    sequences: Tensor | None,
) -> Tensor:
    """Rows of positions that a token's number in its sequence tells: of kind "prompt" or "all"."""
    mine = prompt if prompt.packed else prompt.select(sequences)
    number = mine.numbers(window_start, window)
    column = torch.arange(window, device=number.device)
    if prompt.packed:
        owner = prompt.owner(window)
        length: Tensor = prompt.length[owner]
    else:
        length = mine.length.unsqueeze(1)
    wanted = covered(config.parsed_positions, number, length, config.prompt_end)
    if prompt.packed:
        return torch.where(wanted & _belongs(prompt, owner, sequences), column, -1)
    return _in_batch(torch.where(wanted, column, -1), sequences, window)


def _in_batch(places: Tensor, sequences: Tensor | None, window: int) -> Tensor:
    """Places (B, P) in windows as rows of the flattened batch."""
    if sequences is None:
        sequences = torch.arange(places.shape[0], device=places.device)
    return torch.where(places < 0, places, places + sequences.unsqueeze(1) * window)


def _belongs(prompt: Prompt, owner: Tensor, sequences: Tensor | None) -> Tensor | bool:
    """Whether each column of a packed batch is of one of these sequences."""
    if sequences is None:
        return True
    member = torch.zeros_like(prompt.length, dtype=torch.bool)
    return member.index_fill(0, sequences, True)[owner]


def _chosen_rows(
    chosen: Tensor,
    prompt: Prompt,
    window_start: int | Tensor,
    window: int,
    sequences: Tensor | None,
) -> Tensor:
    column = torch.arange(window, device=chosen.device)
    if chosen.dtype != torch.bool:
        mine = chosen if sequences is None else chosen[sequences]
        place = mine - window_start
        place = torch.where((mine >= 0) & (place >= 0) & (place < window), place, -1)
        return place if prompt.packed else _in_batch(place, sequences, window)
    if prompt.packed:
        wanted = chosen.reshape(-1) & _belongs(prompt, prompt.owner(window), sequences)
        return torch.where(wanted, column, -1)
    mine = chosen if sequences is None else chosen[sequences]
    absolute = column + window_start
    inside = absolute < mine.shape[1]
    wanted = mine[:, absolute.clamp(max=mine.shape[1] - 1)] & inside
    return _in_batch(torch.where(wanted, column, -1), sequences, window)


class ForwardPlan:
    """What one forward edits.

    Attributes:
        shape: (B, S) of the window.
        start: column of the batch at which the window begins: the length of the cache.
        adapters: what tells whether another forward edits with the same ones.
        cache: the cache that the forward was given, or None.
        served: edits with entries of tables, see :mod:`reft.model.grouped_edits`.
        edits: (block number, component) -> the edits of its output, usually one.
        recorded: whether gradients were recorded when it was made.
        replayed: set by a hook that saw the first run of a checkpointed region without gradients;
            the second run then needs weights with a graph of its own, see :meth:`again`.
    """

    def __init__(
        self,
        members: Sequence[Member],
        shape: tuple[int, int],
        served: Mapping[EditSite, Sequence[Edit]] = MappingProxyType({}),
    ) -> None:
        self.members, self.shape, self.served = tuple(members), shape, served
        self.edits = _assemble(self.members)
        for site, edits in served.items():
            self.edits[site] = (*self.edits.get(site, ()), *edits)
        self.recorded = torch.is_grad_enabled()
        self.replayed = False
        self.start: int | Tensor = 0
        self.adapters: tuple[object, ...] = ()
        self.cache: Any = None

    def again(self) -> ForwardPlan:
        """The same rows with freshly computed weights. The same numbers: no optimizer steps
        between a forward and its backward."""
        return ForwardPlan(self.members, self.shape, self.served)


def _assemble(members: tuple[Member, ...]) -> dict[EditSite, tuple[Edit, ...]]:
    whole = {
        id(adapter): adapter()
        for adapter in {id(one.adapter): one.adapter for one in members}.values()
    }
    weights = [
        scale(mask_ranks(whole[id(member.adapter)], member.kept), member.scale)
        for member in members
    ]
    by_site: dict[EditSite, list[int]] = {}
    for index, member in enumerate(members):
        for layer in member.adapter.layers:
            by_site.setdefault((layer, member.adapter.config.component), []).append(index)
    plans: dict[tuple[Any, ...], RowPlan] = {}
    edits: dict[EditSite, tuple[Edit, ...]] = {}
    for site, present in by_site.items():
        # Adapters whose edits have one form go into one call, as groups of it.
        kinds: dict[tuple[bool, str | None, float, str], list[int]] = {}
        for index in present:
            first, member = weights[index][0], members[index]
            kind = (
                first.subtract,
                first.activation,
                member.dropout,
                member.adapter.config.dropout_on,
            )
            kinds.setdefault(kind, []).append(index)
        calls = []
        for kind, chosen in kinds.items():
            places = [members[index].adapter.layers.index(site[0]) for index in chosen]
            joined = concatenate(
                [weights[index][place] for index, place in zip(chosen, places, strict=True)]
            )
            device = joined.decode.device
            key: tuple[Any, ...] = tuple(chosen)
            if key not in plans:
                plans[key] = _row_plan([rows for index in chosen for rows in members[index].rows])
            # Of a model spread over devices, each device gets the rows once.
            key, there = (*key, device), plans[key]
            if key not in plans:
                plans[key] = there.to(device)
            calls.append(Edit(plans[key], joined, dropout=kind[2], dropout_on=kind[3]))
        edits[site] = tuple(calls)
    return edits


def _row_plan(groups: list[Tensor]) -> RowPlan:
    if len(groups) == 1:
        return RowPlan.from_rows(groups[0])
    return RowPlan(torch.cat(groups), (0, *accumulate(rows.shape[0] for rows in groups)))
