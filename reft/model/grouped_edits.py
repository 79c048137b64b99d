"""Edits with weights from the device cache: one call of the operator per block, however many
adapters a batch mixes.

Rows are laid out by positions, not by adapter: all sequences whose adapters have the same positions
get their rows from one computation on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from reft.adapter.device_cache import AdapterCache, CacheItem, EditKind, EditSite, Lease
from reft.adapter.edit_weights import mask_ranks
from reft.adapter.host_adapter import HostAdapter
from reft.adapter.pool import AdapterPool
from reft.model.batch import BatchAdapter
from reft.model.edited_rows import RowFinder
from reft.model.forward_plan import Edit, EditGroup, group_edits, rank_mask
from reft_kernels import RowPlan
from reft_kernels.spec import EditWeights

#: All rows, group by group, and (index of the adapter, its group) of each group of rows.
RowLayout = tuple[RowPlan, list[tuple[int, int]]]


@dataclass(frozen=True, eq=False)
class _SlotGroup:
    """Adapters of one kind in the cache. At a site that an adapter does not edit, its rows get slot
    −1, which leaves them unchanged.

    Attributes:
        cache: holds the weights.
        kind: of the edits.
        slots: (adapter) -> its slots in the cache, one per group.
        layout: rows of all adapters of the kind.
        factors: float32, one per group of rows; None for 1.
        lease: keeps the slots from being overwritten.
    """

    cache: AdapterCache
    kind: EditKind
    slots: Sequence[tuple[int, ...]]
    layout: RowLayout
    factors: Tensor | None
    lease: Lease

    def weights(self, site: EditSite, members: Sequence[int]) -> EditWeights:
        return self.cache.weights_at(site, self.kind)

    def rows(self, members: Sequence[int]) -> RowPlan:
        rows, owners = self.layout
        editing = set(members)
        slots = [self.slots[index][group] if index in editing else -1 for index, group in owners]
        return rows.using(torch.tensor(slots, device=rows.device), self.factors)

    def edit(self, rows: RowPlan, weights: EditWeights) -> Edit:
        return Edit(rows, weights, lease=self.lease)


def cached_edits(
    cache: AdapterCache,
    items: Sequence[CacheItem],
    scales: Sequence[float],
    layout_of: Callable[[Sequence[int]], RowLayout],
    *,
    device: torch.device,
) -> dict[EditSite, list[Edit]]:
    """The edits of every site: one for all adapters without an activation, one per activation.

    Args:
        cache: gets the adapters that it does not hold.
        items: the adapters of the batch.
        scales: factor of each adapter's edit.
        layout_of: indices of adapters -> the layout of their rows.
        device: of the rows.

    Raises:
        ValueError: more adapters than the cache's capacity. Nothing was changed.
    """
    slots, lease = cache.lease(items)

    def group_of(kind: EditKind, members: Sequence[int]) -> EditGroup:
        rows, owners = layout_of(members)
        factors = None
        if any(scales[index] != 1.0 for index in members):
            listed = [scales[index] for index, _ in owners]
            factors = torch.tensor(listed, dtype=torch.float32, device=device)
        return _SlotGroup(cache, kind, slots, (rows, owners), factors, lease)

    return group_edits([item.kind for item in items], [item.sites for item in items], group_of)


def batch_edits(
    pool: AdapterPool,
    adapters: Sequence[BatchAdapter],
    finder: RowFinder,
    *,
    sequences: int,
    device: torch.device,
    packed: bool,
) -> dict[EditSite, list[Edit]]:
    """The edits of the adapters of a batch whose weights come from the pool's cache.

    Args:
        finder: finds their rows.
        sequences: of the batch; for a packed batch those packed in it.
        device: of the rows.
        packed: the sequences lie one behind another.

    Raises:
        ValueError: more adapters than the cache's capacity. Nothing was changed.
    """
    everything = tuple(range(sequences))
    owned = [adapter.sequences or everything for adapter in adapters]

    def layout_of(members: Sequence[int]) -> RowLayout:
        return _row_layout(adapters, owned, members, finder, sequences, device, packed)

    return cached_edits(
        pool.cache,
        [_cache_item(pool, adapter) for adapter in adapters],
        [adapter.scale for adapter in adapters],
        layout_of,
        device=device,
    )


def _cache_item(pool: AdapterPool, adapter: BatchAdapter) -> CacheItem:
    source = adapter.source
    if isinstance(source, HostAdapter):
        weights = mask_ranks(source.weights, rank_mask(adapter, "cpu"))
        return CacheItem((source.content_hash, adapter.active_ranks), weights, source.sites)
    return pool.cache.current_item(adapter.name, source(), source.sites)


def _row_layout(
    adapters: Sequence[BatchAdapter],
    owned: Sequence[tuple[int, ...]],
    members: Sequence[int],
    finder: RowFinder,
    batch: int,
    device: torch.device,
    packed: bool,
) -> RowLayout:
    """The rows of some adapters. Those with the same positions are computed together, but for a
    packed batch, whose sequences have no rectangle of columns.

    Args:
        owned: the sequences of each adapter.
        members: indices of the adapters.
    """
    same_positions: dict[tuple[object, ...], list[int]] = {}
    for index in members:
        config = adapters[index].config
        key: tuple[object, ...] = (
            config.positions, config.short_prompts, config.prompt_end, config.tied,
            config.untied_by,
        )  # fmt: skip
        same_positions.setdefault((*key, index) if packed else key, []).append(index)
    rows_of_groups: list[Tensor] = []
    sizes: list[int] = []
    owners: list[tuple[int, int]] = []
    for indices in same_positions.values():
        # Groups of one size side by side are one batched product.
        indices = sorted(indices, key=lambda index: len(owned[index]))
        listed = [sequence for index in indices for sequence in owned[index]]
        whole_batch = listed == list(range(batch))
        selected = None if whole_batch else torch.tensor(listed, device=device)
        for group, rows in enumerate(finder.rows(adapters[indices[0]].source, selected)):
            rows_of_groups.append(rows)
            size = rows.shape[0] if packed else rows.shape[0] // len(listed)
            for index in indices:
                sizes.append(size if packed else size * len(owned[index]))
                owners.append((index, group))
    joined = rows_of_groups[0] if len(rows_of_groups) == 1 else torch.cat(rows_of_groups)
    return RowPlan(joined.contiguous(), (0, *accumulate(sizes))), owners
