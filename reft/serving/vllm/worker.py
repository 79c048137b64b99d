"""The adapters of a worker: read by content hash, planned for each step, applied by an operator."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from reft.adapter.device_cache import AdapterCache, CacheItem
from reft.adapter.host_adapter import HostAdapter, read_host_adapter
from reft.adapter.requests import UNEDITED, Chunk
from reft.model.forward_plan import Edit, ForwardPlan
from reft.model.step_plan import plan_engine_step
from reft.serving.vllm.request_adapter import RequestAdapter
from reft.serving.vllm.settings import Settings
from reft_kernels import RowPlan
from reft_kernels.functional import apply_edit

#: The workers whose forwards are in progress in this process; the operator applies the last one's
#: plan.
_running: list[Worker] = []


class Worker:
    """The adapters of one model in one process.

    Attributes:
        plan: of the next step; None if nothing in it is edited, as in decoding.

    Args:
        settings: of the engine.
        num_layers, dim: of the model.
        device: of the model.
    """

    def __init__(self, settings: Settings, num_layers: int, dim: int, device: torch.device) -> None:
        self.settings, self.num_layers, self.dim, self.device = settings, num_layers, dim, device
        self.cache = AdapterCache(settings.max_adapters, lambda site: device)
        self.plan: ForwardPlan | None = None
        self._host_adapters: OrderedDict[str, HostAdapter] = OrderedDict()
        self._gathered_plans: dict[int, tuple[RowPlan, RowPlan]] = {}

    def prepare(
        self, chunks: Iterable[tuple[RequestAdapter | None, int, int, int]], width: int
    ) -> None:
        """Plan the next step.

        Args:
            chunks: (adapter, prompt length, tokens computed before, tokens computed now) of each
                request, in the order in which the step concatenates their tokens.
            width: tokens of the step.
        """
        planned = []
        for adapter, prompt_length, start, count in chunks:
            request = UNEDITED
            if adapter is not None:
                request = adapter.request(prompt_length)
                if next(request.edited(start, start + count), None) is not None:
                    request = replace(request, item=self._cache_item(adapter.content_hash))
            planned.append(Chunk(request, start, start + count))
        self._gathered_plans.clear()
        self.plan = plan_engine_step(self.cache, planned, width, self.device)

    def _cache_item(self, content_hash: str) -> CacheItem:
        adapter = self._host_adapters.get(content_hash)
        if adapter is None:
            path = self.settings.cache_folder / content_hash
            adapter = read_host_adapter(path, num_layers=self.num_layers, dim=self.dim)
            if adapter.content_hash != content_hash:
                raise RuntimeError(f"{path} was changed: it holds {adapter.content_hash}")
            self._host_adapters[content_hash] = adapter
            while len(self._host_adapters) > self.settings.max_cpu_adapters:
                self._host_adapters.popitem(last=False)
        self._host_adapters.move_to_end(content_hash)
        sites = tuple((layer, "block_output") for layer in adapter.layers)
        return CacheItem((content_hash, None), adapter.weights, sites)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Make the operator apply this worker's plan while the context is entered.

        The plan is dropped at the end: a forward without :meth:`prepare`, such as one that measures
        memory, edits nothing.
        """
        _running.append(self)
        try:
            yield
        finally:
            _running.pop()
            self.plan = None

    def edits(self, layer: int) -> Sequence[Edit]:
        """Return the edits of the output of a block."""
        if self.plan is None:
            return ()
        return self.plan.edits.get((layer, "block_output"), ())

    def gathered_plan(self, rows: RowPlan) -> RowPlan:
        """Return the plan for a tensor that holds only the edited rows, concatenated."""
        plans = self._gathered_plans.get(id(rows))
        if plans is None:
            numbers = torch.arange(rows.num_rows, device=rows.device)
            gathered = RowPlan(numbers, rows.offsets, max_row=rows.num_rows - 1, complete=True)
            assert rows.slots is not None
            plans = self._gathered_plans[id(rows)] = (
                rows,
                gathered.using(rows.slots, rows.scales),
            )
        return plans[1]


@torch.library.custom_op("reft::edit_block", mutates_args=("hidden", "residual"))
def edit_block(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    """Edit the output of a block on the rows of the step in progress; in decoding, nothing.

    Args:
        hidden: (…, D). Without ``residual`` it is the residual stream h, edited in place.
        residual: (N, D); then h = hidden + residual, as vLLM's own models pass it on. On the edited
            rows ``hidden`` becomes h′ and ``residual`` 0, so that their sum is exact.
        layer: the number of the block.
    """
    if not _running:
        return
    worker = _running[-1]
    for edit in worker.edits(layer):
        if residual is None:
            apply_edit(hidden, edit.rows, edit.weights, in_place=True)
            continue
        rows = edit.rows.rows
        h = hidden.index_select(0, rows) + residual.index_select(0, rows)
        apply_edit(h, worker.gathered_plan(edit.rows), edit.weights, in_place=True)
        hidden.index_copy_(0, rows, h)
        residual.index_fill_(0, rows, 0)


@edit_block.register_fake
def _(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    return None
