"""The worker's part: adapters read by content, the plan of a step, the operator that follows it."""

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
from reft.serving.vllm.request_adapter import Ticket
from reft.serving.vllm.settings import Settings
from reft_kernels import RowPlan
from reft_kernels.functional import apply_edit

#: What the operator follows: of the model whose forward is in progress in this process.
_running: list[Worker] = []


class Worker:
    """Adapters of one model in one process.

    Attributes:
        plan: of the step that comes next; None if nothing in it is edited, as in decoding.

    Args:
        settings: of the engine.
        num_layers, dim: of the model.
        device: where it runs.
    """

    def __init__(self, settings: Settings, num_layers: int, dim: int, device: torch.device) -> None:
        self.settings, self.num_layers, self.dim, self.device = settings, num_layers, dim, device
        self.tables = AdapterCache(settings.resident, lambda site: device)
        self.plan: ForwardPlan | None = None
        self._hosted: OrderedDict[str, HostAdapter] = OrderedDict()
        self._dense: dict[int, tuple[RowPlan, RowPlan]] = {}

    def prepare(self, chunks: Iterable[tuple[Ticket | None, int, int, int]], width: int) -> None:
        """Plan the next step.

        Args:
            chunks: (ticket, prompt length, tokens computed before, tokens computed now) of each
                request, in the order in which their tokens lie behind one another.
            width: tokens of the step.
        """
        parts = []
        for ticket, prompt_length, start, count in chunks:
            request = UNEDITED
            if ticket is not None:
                request = ticket.request(prompt_length)
                if next(request.edited(start, start + count), None) is not None:
                    request = replace(request, resident=self._resident(ticket.content))
            parts.append(Chunk(request, start, start + count))
        self._dense.clear()
        self.plan = plan_engine_step(self.tables, parts, width, self.device)

    def _resident(self, content: str) -> CacheItem:
        one = self._hosted.get(content)
        if one is None:
            path = self.settings.cache_folder / content
            one = read_host_adapter(path, num_layers=self.num_layers, dim=self.dim)
            if one.content != content:
                raise RuntimeError(f"{path} was changed: it holds {one.content}")
            self._hosted[content] = one
            while len(self._hosted) > self.settings.hosted:
                self._hosted.popitem(last=False)
        self._hosted.move_to_end(content)
        sites = tuple((layer, "block_output") for layer in one.layers)
        return CacheItem((content, None), one.weights, sites)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the operator follows this worker's plan; afterwards the plan is forgotten, so
        that a forward nobody prepared, such as one that measures memory, edits nothing."""
        _running.append(self)
        try:
            yield
        finally:
            _running.pop()
            self.plan = None

    def edits(self, layer: int) -> Sequence[Edit]:
        """The edits after a block."""
        if self.plan is None:
            return ()
        return self.plan.edits.get((layer, "block_output"), ())

    def dense(self, rows: RowPlan) -> RowPlan:
        """The plan for a tensor that holds the edited rows alone, one behind another."""
        found = self._dense.get(id(rows))
        if found is None:
            numbers = torch.arange(rows.num_rows, device=rows.device)
            alone = RowPlan(numbers, rows.offsets, max_row=rows.num_rows - 1, complete=True)
            assert rows.slots is not None
            found = self._dense[id(rows)] = (rows, alone.using(rows.slots, rows.scales))
        return found[1]


@torch.library.custom_op("reft::edit_block", mutates_args=("hidden", "residual"))
def edit_block(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    """Edit the output of a block on the rows of the step in progress: nothing in decoding.

    Args:
        hidden: (…, D). Without ``residual`` it is the residual stream h, edited in place.
        residual: (N, D); then h = hidden + residual, as vLLM's own models hand it on. On the edited
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
        apply_edit(h, worker.dense(edit.rows), edit.weights, in_place=True)
        hidden.index_copy_(0, rows, h)
        residual.index_fill_(0, rows, 0)


@edit_block.register_fake
def _(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    return None
