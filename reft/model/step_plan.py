"""The plan of a step of an engine that computes chunks of many requests at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from reft.adapter.device_cache import AdapterCache, CacheItem, EditSite
from reft.adapter.requests import Chunk, step_rows
from reft.model.forward_plan import Edit, ForwardPlan
from reft.model.grouped_edits import RowLayout, cached_edits
from reft_kernels import RowPlan


def plan_engine_step(
    cache: AdapterCache, chunks: Sequence[Chunk], width: int, device: torch.device
) -> ForwardPlan | None:
    """The plan of one step; None if it edits nothing, as a decoding step.

    Adapters beyond the cache's capacity get a cache of their own for this step.

    Args:
        cache: of the pool.
        chunks: in the order in which their tokens lie behind one another.
        width: tokens of the step, (1, width).
        device: of the rows.

    Raises:
        RuntimeError: the chunks have more tokens than the step.
    """
    tokens = sum(stop - start for _, start, stop in chunks)
    if tokens > width:
        raise RuntimeError(f"a step of {width} tokens cannot hold chunks of {tokens} tokens")
    edited = step_rows(chunks)
    if not edited:
        return None
    present = set(cache.keys)
    keys = sorted({key for key, _ in edited}, key=lambda key: key not in present)
    fitting = set(keys[: cache.capacity])
    edits: dict[EditSite, list[Edit]] = {}
    for fits in (True, False):
        chosen = [entry for entry in edited if (entry[0] in fitting) == fits]
        if not chosen:
            continue
        step_cache = cache if fits else cache.temporary(len(chosen))
        step_edits = _edits(
            step_cache,
            [edited[entry][0] for entry in chosen],
            [edited[entry][1] for entry in chosen],
            [scale for _, scale in chosen],
            device,
        )
        for site, calls in step_edits.items():
            edits.setdefault(site, []).extend(calls)
    return ForwardPlan((), (), (1, width), edits)


def _edits(
    cache: AdapterCache,
    items: Sequence[CacheItem],
    rows: Sequence[dict[int, list[int]]],
    scales: Sequence[float],
    device: torch.device,
) -> dict[EditSite, list[Edit]]:
    """The edits of adapters whose rows of the step are known on the host."""

    def layout_of(members: Sequence[int]) -> RowLayout:
        owners = [(index, group) for index in members for group in rows[index]]
        # Groups of one size side by side are one batched product.
        owners.sort(key=lambda owner: len(rows[owner[0]][owner[1]]))
        listed = [rows[index][group] for index, group in owners]
        joined = [row for group in listed for row in group]
        plan = RowPlan(
            torch.tensor(joined).to(device),
            (0, *accumulate(map(len, listed))),
            max_row=max(joined),
            complete=True,
        )
        return plan, owners

    return cached_edits(cache, items, scales, layout_of, device=device)
