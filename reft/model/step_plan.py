"""The plan of a step of an engine that lays chunks of many requests one behind another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch

from reft.adapter.device_cache import AdapterCache, CacheItem, EditSite
from reft.adapter.requests import Chunk, Request, step_rows
from reft.model.forward_plan import Edit, ForwardPlan
from reft.model.grouped_edits import Layout, table_edits
from reft_kernels import RowPlan


class Engine(Protocol):
    """What a forward asks of an engine that runs the model."""

    def parts(self, cache: object) -> list[Chunk] | None:
        """What the forward with this cache computes; None if it is not the engine's."""

    def busy(self) -> bool:
        """Whether a forward in this thread would meet one of the engine's."""

    def is_running(self) -> bool: ...

    def requests(self) -> list[Request]:
        """Those that are not over."""


def plan_engine_step(
    tables: AdapterCache, parts: Sequence[Chunk], width: int, device: torch.device
) -> ForwardPlan | None:
    """The plan of one step; None if nothing in it is edited, as in decoding.

    Adapters beyond the capacity of the tables are brought to the device for this step alone.

    Args:
        tables: of the pool.
        parts: chunks, in the order in which they lie behind one another.
        width: tokens of the step, (1, width).
        device: where rows are wanted.

    Raises:
        RuntimeError: the chunks have more tokens than the step.
    """
    told = sum(stop - start for _, start, stop in parts)
    if told > width:
        raise RuntimeError(f"a step of {width} tokens cannot hold chunks of {told}")
    found = step_rows(parts)
    if not found:
        return None
    there = set(tables.keys)
    keys = sorted({key for key, _ in found}, key=lambda key: key not in there)
    fitting = set(keys[: tables.capacity])
    edits: dict[EditSite, list[Edit]] = {}
    for inside in (True, False):
        chosen = [one for one in found if (one[0] in fitting) == inside]
        if not chosen:
            continue
        residents = [found[one][0] for one in chosen]
        rows = [found[one][1] for one in chosen]
        scales = [scale for _, scale in chosen]
        where = tables if inside else tables.temporary(len(chosen))
        more = _edits(where, residents, rows, scales, device)
        for site, calls in more.items():
            edits.setdefault(site, []).extend(calls)
    return ForwardPlan((), (1, width), edits)


def _edits(
    tables: AdapterCache,
    residents: Sequence[CacheItem],
    rows: Sequence[dict[int, list[int]]],
    scales: Sequence[float],
    device: torch.device,
) -> dict[EditSite, list[Edit]]:
    def layout(members: Sequence[int]) -> Layout:
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

    return table_edits(tables, residents, scales, layout, device=device)
