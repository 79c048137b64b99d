"""The edits of a batch that mixes adapters: one call of the operator a block, with rows that name
entries of tables, however many adapters there are.

Rows are laid out by where adapters edit, not by adapter: all sequences whose adapters have the same
positions get their rows from one computation on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reft.adapter.device_cache import AdapterCache, CacheItem, EditKind, EditSite
from reft.adapter.edit_weights import mask_ranks
from reft.adapter.host_adapter import HostAdapter
from reft.adapter.parameters import AdapterParameters
from reft.config import ReftConfig
from reft.model.batch import BatchAdapter, sites_of
from reft.model.forward_plan import Edit, ForwardPlan, Member
from reft_kernels import RowPlan

if TYPE_CHECKING:
    from reft.model.registry import AdapterRegistry

#: (configuration, numbers of sequences or None for all) -> rows of each group, sequence by
#: sequence, the same number for each.
RowsOf = Callable[[ReftConfig, Tensor | None], tuple[Tensor, ...]]


def make_plan(
    registry: AdapterRegistry,
    chosen: Sequence[BatchAdapter],
    rows_of: RowsOf,
    shape: tuple[int, int],
    *,
    sequences: int,
    device: torch.device,
    packed: bool,
) -> ForwardPlan:
    """The plan of a forward: adapters that are trained, or alone, with their own parameters, the
    others from tables.

    Args:
        chosen: the adapters of the batch.
        rows_of: see above.
        shape: (B, S) of the window.
        sequences: of the batch; of a packed one those in it.
        device: where rows are computed.
        packed: whether the sequences lie one behind another.

    Raises:
        ValueError: adapters of the pool in a compiled model, beside one that is trained, or more
            than it holds at once. Nothing was changed.
    """
    apart: list[BatchAdapter] = []
    items: list[BatchAdapter] = []
    trained = torch.is_grad_enabled() and [
        one.name
        for one in chosen
        if not isinstance(one.source, HostAdapter)
        and any(parameter.requires_grad for parameter in one.source.parameters())
    ]
    for one in chosen:
        if isinstance(one.source, HostAdapter) and torch.compiler.is_compiling():
            raise ValueError(
                f"adapter {one.name!r} is in the pool, which a compiled model cannot use: load it "
                "with load_adapter before compiling, or do not compile"
            )
        if isinstance(one.source, HostAdapter) and trained:
            raise ValueError(
                f"adapter {one.name!r} is in the pool, which is for inference, and {trained[0]!r} "
                "is trained in the same batch: use torch.no_grad(), or load it with load_adapter"
            )
        (items if _from_tables(one, len(chosen)) else apart).append(one)
    members = []
    for one in apart:
        mine = None if one.sequences is None else torch.tensor(one.sequences, device=device)
        adapter = one.source
        assert not isinstance(adapter, HostAdapter)
        dropout = adapter.config.dropout if adapter.training else 0.0
        rows = rows_of(adapter.config, mine)
        members.append(Member(adapter, rows, dropout, _mask(one, device), one.scale))
    if not items:
        return ForwardPlan(members, shape)
    everyone = tuple(range(sequences))
    asked = [
        Item(one.config, _resident(registry, one), one.sequences or everyone, one.scale)
        for one in items
    ]

    def layout(indices: Sequence[int]) -> Layout:
        return _layout(asked, indices, rows_of, sequences, device, packed)

    served = table_edits(
        registry.pool.cache,
        [item.resident for item in asked],
        [item.scale for item in asked],
        layout,
        device=device,
    )
    return ForwardPlan(members, shape, served)


def _from_tables(one: BatchAdapter, adapters: int) -> bool:
    """Whether an adapter's edits may come from tables, and gain by it."""
    if isinstance(one.source, HostAdapter):
        return True
    if not isinstance(one.source, AdapterParameters) or torch.compiler.is_compiling():
        return False
    if one.source.training or one.kept is not None or torch.is_grad_enabled():
        return False
    return adapters > 1 or one.scale != 1.0


def _mask(one: BatchAdapter, device: torch.device | str) -> Tensor | None:
    """Which directions are kept, bool (r,)."""
    if one.kept is None:
        return None
    return torch.tensor([at in one.kept for at in range(one.config.rank)], device=device)


def _resident(registry: AdapterRegistry, one: BatchAdapter) -> CacheItem:
    sites = sites_of(one.source)
    if isinstance(one.source, HostAdapter):
        weights = mask_ranks(one.source.weights, _mask(one, "cpu"))
        return CacheItem((one.source.content_hash, one.kept), weights, sites)
    return registry.pool.cache.current_item(one.name, one.source(), sites)


@dataclass(frozen=True, eq=False)
class Item:
    """One adapter of the batch.

    Attributes:
        config: where it edits.
        resident: with what.
        sequences: the numbers of its sequences.
        scale: what its edit is multiplied by.
    """

    config: ReftConfig
    resident: CacheItem
    sequences: tuple[int, ...]
    scale: float


#: All rows, group by group, and (item, its group) of each group.
Layout = tuple[RowPlan, list[tuple[int, int]]]


def table_edits(
    tables: AdapterCache,
    residents: Sequence[CacheItem],
    scales: Sequence[float],
    layout: Callable[[Sequence[int]], Layout],
    *,
    device: torch.device,
) -> dict[EditSite, list[Edit]]:
    """The edits of every site: one for all adapters without an activation, one for each activation.

    Args:
        tables: where the adapters are, or are brought now.
        residents: the items of the batch: what edits.
        scales: what each item's edit is multiplied by.
        layout: the numbers of some items -> their rows.
        device: where rows are computed.

    Raises:
        ValueError: more adapters than the tables take. Nothing was changed.
    """
    entries, lease = tables.lease(residents)
    kinds: dict[EditKind, list[int]] = {}
    for index, resident in enumerate(residents):
        kinds.setdefault(resident.kind, []).append(index)
    edits: dict[EditSite, list[Edit]] = {}
    for kind, members in kinds.items():
        rows, owners = layout(members)
        factors = None
        if any(scales[index] != 1.0 for index in members):
            factors = torch.tensor(
                [scales[index] for index, _ in owners], dtype=torch.float32, device=device
            )
        # Adapters of other layers have no entry at a site: its rows pass them by.
        layouts = list(dict.fromkeys(residents[index].sites for index in members))
        plans: dict[tuple[object, ...], RowPlan] = {}
        for site in dict.fromkeys(site for sites in layouts for site in sites):
            weights = tables.weights_at(site, kind)
            present = {sites for sites in layouts if site in sites}
            key: tuple[object, ...] = tuple(sites in present for sites in layouts)
            if key not in plans:
                slots = [
                    entries[index][group] if residents[index].sites in present else -1
                    for index, group in owners
                ]
                plans[key] = rows.using(torch.tensor(slots, device=device), factors)
            there, key = plans[key], (*key, weights.decode.device)
            if key not in plans:
                plans[key] = there.to(weights.decode.device)
            edits.setdefault(site, []).append(Edit(plans[key], weights, lease=lease))
    return edits


def _layout(
    items: Sequence[Item],
    members: Sequence[int],
    rows_of: RowsOf,
    batch: int,
    device: torch.device,
    apart: bool,
) -> Layout:
    alike: dict[tuple[object, ...], list[int]] = {}
    for index in members:
        config = items[index].config
        key: tuple[object, ...] = (
            config.positions, config.short_prompts, config.prompt_end, config.tied,
            config.untied_by,
        )  # fmt: skip
        alike.setdefault((*key, index) if apart else key, []).append(index)
    parts: list[Tensor] = []
    sizes: list[int] = []
    owners: list[tuple[int, int]] = []
    for same in alike.values():
        # Groups of one size side by side are one batched product.
        same = sorted(same, key=lambda index: len(items[index].sequences))
        numbers = [number for index in same for number in items[index].sequences]
        whole = numbers == list(range(batch))
        sequences = None if whole else torch.tensor(numbers, device=device)
        for group, rows in enumerate(rows_of(items[same[0]].config, sequences)):
            parts.append(rows)
            each = rows.shape[0] if apart else rows.shape[0] // len(numbers)
            for index in same:
                sizes.append(each if apart else each * len(items[index].sequences))
                owners.append((index, group))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return RowPlan(joined.contiguous(), (0, *accumulate(sizes))), owners
