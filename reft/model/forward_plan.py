"""The plan of one forward: the edits of every block, each with its rows and weights.

It is made on the device before the first block runs, and all blocks share it. It holds the weights
of its forward, so that a block that runs again in backward uses those of its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from reft.adapter.device_cache import EditSite, Lease
from reft.adapter.edit_weights import LayerWeights, concatenate, mask_ranks, scale
from reft.adapter.host_adapter import HostAdapter
from reft.model.batch import BatchAdapter
from reft_kernels import RowPlan
from reft_kernels.spec import EditWeights

KindT = TypeVar("KindT", bound=Hashable)


@dataclass(frozen=True, eq=False)
class Edit:
    """One call of the operator.

    Attributes:
        rows: the edited rows.
        weights: A, b and R of the groups of the rows.
        dropout: probability of dropout of the edit.
        dropout_on: "delta" or "row", see :func:`reft.model.dropout.dropped_edit`.
        lease: keeps the weights from being overwritten, where they are slots of a cache.
    """

    rows: RowPlan
    weights: EditWeights
    dropout: float = 0.0
    dropout_on: str = "delta"
    lease: Lease | None = None


class ForwardPlan:
    """The edits of one forward.

    Args:
        adapters: adapters that edit with their own parameters.
        rows: for each of them one int64 vector of rows per group, −1 for none.
        shape: (B, S) of the columns of the forward.
        cached: edits with slots of the device cache, see :mod:`reft.model.grouped_edits`.

    Attributes:
        edits: (block number, component) -> the edits of its output, usually one.
        start: first column of the forward in the batch: the length of the cache.
        identity: equal for two forwards that edit with the same adapters in the same way.
        cache: the cache that the forward was given, or None.
        recorded: whether gradients were recorded when the plan was made.
        replayed: a hook has seen the first run of a checkpointed region without gradients; the
            second run needs weights with a graph of their own, see :meth:`again`.
    """

    def __init__(
        self,
        adapters: Sequence[BatchAdapter],
        rows: Sequence[tuple[Tensor, ...]],
        shape: tuple[int, int],
        cached: Mapping[EditSite, Sequence[Edit]] = MappingProxyType({}),
    ) -> None:
        self.adapters, self.rows, self.shape, self.cached = tuple(adapters), rows, shape, cached
        self.edits = _edits_with_parameters(self.adapters, rows) if adapters else {}
        for site, edits in cached.items():
            self.edits[site] = [*self.edits.get(site, ()), *edits]
        self.recorded = torch.is_grad_enabled()
        self.replayed = False
        self.start: int | Tensor = 0
        self.identity: tuple[object, ...] = ()
        self.cache: Any = None

    def again(self) -> ForwardPlan:
        """Make the plan again with newly computed weights. Their values are the same, since no
        optimizer steps between a forward and its backward."""
        return ForwardPlan(self.adapters, self.rows, self.shape, self.cached)


class EditGroup(Protocol):
    """Adapters whose edits at one site are one call of the operator."""

    def weights(self, site: EditSite, members: Sequence[int]) -> EditWeights:
        """The weights of the adapters ``members`` at a site."""

    def rows(self, members: Sequence[int]) -> RowPlan:
        """The rows of the adapters ``members``, in the order of the weights."""

    def edit(self, rows: RowPlan, weights: EditWeights) -> Edit:
        """The edit of these rows."""


def group_edits(
    kinds: Sequence[KindT],
    layouts: Sequence[tuple[EditSite, ...]],
    group_of: Callable[[KindT, Sequence[int]], EditGroup],
) -> dict[EditSite, list[Edit]]:
    """Group the adapters of a batch into calls of the operator, one for each site and kind of edit.

    Args:
        kinds: of each adapter; adapters of one kind share calls.
        layouts: the sites of each adapter.
        group_of: (kind, indices of its adapters) -> their group.
    """
    edits: dict[EditSite, list[Edit]] = {}
    by_kind: dict[KindT, list[int]] = {}
    for index, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(index)
    for kind, indices in by_kind.items():
        group = group_of(kind, indices)
        # Many adapters have few layouts. The adapters at a site are listed once for each set of
        # layouts that has the site.
        distinct = {layouts[index]: frozenset(layouts[index]) for index in indices}
        members: dict[tuple[bool, ...], list[int]] = {}
        rows: dict[tuple[tuple[bool, ...], torch.device], RowPlan] = {}
        for site in dict.fromkeys([site for layout in distinct for site in layout]):
            having = tuple([site in layout for layout in distinct.values()])
            if having not in members:
                members[having] = [index for index in indices if site in distinct[layouts[index]]]
            weights = group.weights(site, members[having])
            device = weights.decode.device
            if (having, device) not in rows:
                rows[having, device] = group.rows(members[having]).to(device)
            edits.setdefault(site, []).append(group.edit(rows[having, device], weights))
    return edits


@dataclass(frozen=True, eq=False)
class _ParameterGroup:
    """Adapters with parameters: their weights are concatenated, with a graph if they are trained.

    Attributes:
        layer_weights: (adapter) -> its weights at each of its layers.
        layer_index: (adapter) -> layer number -> index in its weights.
        adapter_rows: (adapter) -> one vector of rows per group.
        dropout, dropout_on: see :class:`Edit`.
    """

    layer_weights: Sequence[LayerWeights]
    layer_index: Sequence[Mapping[int, int]]
    adapter_rows: Sequence[tuple[Tensor, ...]]
    dropout: float
    dropout_on: str

    def weights(self, site: EditSite, members: Sequence[int]) -> EditWeights:
        layer, _ = site
        each = [self.layer_weights[index][self.layer_index[index][layer]] for index in members]
        return each[0] if len(each) == 1 else concatenate(each)

    def rows(self, members: Sequence[int]) -> RowPlan:
        groups = [rows for index in members for rows in self.adapter_rows[index]]
        if len(groups) == 1:
            return RowPlan.from_rows(groups[0])
        return RowPlan(torch.cat(groups), (0, *accumulate([rows.shape[0] for rows in groups])))

    def edit(self, rows: RowPlan, weights: EditWeights) -> Edit:
        return Edit(rows, weights, self.dropout, self.dropout_on)


def _edits_with_parameters(
    adapters: Sequence[BatchAdapter], rows: Sequence[tuple[Tensor, ...]]
) -> dict[EditSite, list[Edit]]:
    """The edits of adapters that use their own parameters.

    Raises:
        ValueError: a scale other than 1 for an edit that scaling R does not scale.
    """
    computed: dict[int, LayerWeights] = {}
    weights = [_weights(adapter, computed) for adapter in adapters]
    layer_index = [
        {layer: index for index, layer in enumerate(adapter.source.layers)} for adapter in adapters
    ]
    kinds = []
    for adapter, layers in zip(adapters, weights, strict=True):
        source = adapter.source
        assert not isinstance(source, HostAdapter)
        dropout = source.config.dropout if source.training else 0.0
        kinds.append((layers[0].subtract, layers[0].activation, dropout, source.config.dropout_on))

    def group_of(kind: tuple[bool, str | None, float, str], members: Sequence[int]) -> EditGroup:
        _, _, dropout, dropout_on = kind
        return _ParameterGroup(weights, layer_index, rows, dropout, dropout_on)

    return group_edits(kinds, [adapter.source.sites for adapter in adapters], group_of)


def _weights(adapter: BatchAdapter, computed: dict[int, LayerWeights]) -> LayerWeights:
    """The weights of an adapter with its directions and scale; its R is computed once a forward."""
    source = adapter.source
    assert not isinstance(source, HostAdapter)
    if id(source) not in computed:
        computed[id(source)] = source()
    weights = computed[id(source)]
    if adapter.active_ranks is not None:
        weights = mask_ranks(weights, rank_mask(adapter, weights[0].decode.device))
    return weights if adapter.scale == 1.0 else scale(weights, adapter.scale)


def rank_mask(adapter: BatchAdapter, device: torch.device | str) -> Tensor | None:
    """Whether each direction is used, bool (r,); None if all are."""
    if adapter.active_ranks is None:
        return None
    used = [rank in adapter.active_ranks for rank in range(adapter.config.rank)]
    return torch.tensor(used, device=device)
