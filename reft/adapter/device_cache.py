"""A cache of adapters on the device, for batches that mix adapters.

For each edited layer and kind of edit, the cache holds the weights of all its adapters in tensors
of E slots, (E, r, D), so that one call of the operator edits rows of any of them. An adapter takes
one slot for each of its groups, with the same number in every layer. Smaller ranks are padded with
zeros: a zero row of R adds nothing. If the cache is full, the least recently used adapters are
evicted.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reft.adapter.edit_weights import LayerWeights, num_bytes
from reft.adapter.locks import Lock
from reft_kernels.spec import EditWeights

#: Where an edit acts: block number and component.
EditSite = tuple[int, str]

#: Identifies weights: the content hash of an adapter, and its active ranks or version.
CacheKey = tuple[str, object]

#: Slots that the cache begins with, if its capacity allows.
_FIRST_SLOTS = 8


class EditKind(NamedTuple):
    """The properties that edits must share to be computed in one call."""

    subtract: bool
    activation: str | None
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class CacheItem:
    """The weights of one adapter, to be held in the cache.

    Attributes:
        key: identifies the weights; equal keys mean equal edits, whichever adapter they came from.
        weights: of each site, (g, r, D) and (g, r), on any device.
        sites: where they act, in the order of ``weights``.
    """

    key: CacheKey
    weights: LayerWeights
    sites: tuple[EditSite, ...]

    @property
    def kind(self) -> EditKind:
        first = self.weights[0]
        return EditKind(first.subtract, first.activation, first.decode.dtype)

    @property
    def groups(self) -> int:
        """The number of slots that it takes."""
        return self.weights[0].decode.shape[0]


@dataclass(eq=False)
class LayerSlots:
    """The slots of one site: ``encode`` and ``decode`` (E, r, D), ``bias`` (E, r)."""

    encode: Tensor
    bias: Tensor
    decode: Tensor

    @property
    def nbytes(self) -> int:
        return num_bytes(EditWeights(self.encode, self.bias, self.decode))

    def enlarged(self, slots: int, rank: int) -> LayerSlots:
        """Copy the slots into larger tensors, padded with zeros."""
        new_slots, new_ranks = slots - self.bias.shape[0], rank - self.bias.shape[1]
        return LayerSlots(
            F.pad(self.encode, (0, 0, 0, new_ranks, 0, new_slots)),
            F.pad(self.bias, (0, new_ranks, 0, new_slots)),
            F.pad(self.decode, (0, 0, 0, new_ranks, 0, new_slots)),
        )

    def write(self, slots: Tensor, weights: EditWeights) -> None:
        """Write weights of g groups into slots (g,), padded with zeros to the rank of the slots."""
        missing = self.bias.shape[1] - weights.decode.shape[1]
        for target, value in zip((self.encode, self.bias, self.decode), weights[:3], strict=True):
            if value is None:
                target.index_fill_(0, slots, 0)
                continue
            padding = (0, missing) if value.ndim == 2 else (0, 0, 0, missing)
            target.index_copy_(0, slots, F.pad(value.to(target.device), padding))


class Lease:
    """Keeps slots from being overwritten as long as it lives."""

    def __init__(self, slots: Iterable[tuple[int, ...]]) -> None:
        self.slots = frozenset(slot for item in slots for slot in item)


class _Leases(weakref.WeakSet[Lease]):
    """The live leases. A copied or pickled model has none."""

    def __reduce__(self) -> tuple[type[_Leases], tuple[()]]:
        return _Leases, ()


class AdapterCache:
    """The adapters on the device.

    Threads may use it at once. Forwards in progress that need more adapters together than the
    capacity take additional slots for that time.

    Args:
        capacity: the number of adapters that may be cached at once, at least 1.
        device_of: site to its device.

    Raises:
        ValueError: a capacity below 1.
    """

    def __init__(self, capacity: int, device_of: Callable[[EditSite], torch.device]) -> None:
        self.capacity = capacity
        self._lock = Lock()
        self._device_of = device_of
        self._current: dict[str, CacheItem] = {}
        self._versions = 0
        self._reset()

    def _reset(self) -> None:
        self._layers: dict[tuple[EditSite, EditKind], LayerSlots] = {}
        self._cached: OrderedDict[CacheKey, tuple[int, ...]] = OrderedDict()
        self._free: list[int] = []
        self._leases = _Leases()
        self._evicted: list[int] = []  # slots of evicted items that a lease may still protect
        self._num_slots, self._ranks = 0, dict[EditKind, int]()

    @property
    def capacity(self) -> int:
        """The number of adapters that may be cached at once. A lower value takes effect at the next
        insertion."""
        return self._capacity

    @capacity.setter
    def capacity(self, value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"capacity must be an integer of at least 1, got {value!r}")
        self._capacity = value

    @property
    def keys(self) -> list[CacheKey]:
        """Keys of the cached items, least recently used first."""
        return list(self._cached)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, free ones included."""
        return sum(layer.nbytes for layer in self._layers.values())

    # ---------------------------------------------------------------- insertion and eviction

    @torch.no_grad()
    def insert(self, items: Sequence[CacheItem]) -> list[tuple[int, ...]]:
        """Bring the adapters of one batch onto the device.

        Args:
            items: of the batch; keys may repeat.

        Returns:
            The slots of each item, one for each of its groups.

        Raises:
            ValueError: more different keys than the capacity. Nothing was changed.
        """
        keys = {item.key for item in items}
        if len(keys) > self.capacity:
            raise ValueError(
                f"a batch may use at most {self.capacity} different adapters, the capacity of the "
                f"pool; this one uses {len(keys)}"
            )
        with self._lock:
            self._reclaim()
            missing = {item.key: item for item in items if item.key not in self._cached}
            for key in keys & self._cached.keys():
                self._cached.move_to_end(key)
            excess = max(len(self._cached) + len(missing) - self.capacity, 0)
            for key in [key for key in self._cached if key not in keys][:excess]:
                self.evict(key)
            for item in missing.values():
                self._load(item)
            return [self._cached[item.key] for item in items]

    def lease(self, items: Sequence[CacheItem]) -> tuple[list[tuple[int, ...]], Lease]:
        """Insert items, and return with their slots a lease that protects these slots."""
        with self._lock:
            slots = self.insert(items)
            lease = Lease(slots)
            self._leases.add(lease)
            return slots, lease

    def evict(self, key: CacheKey) -> None:
        """Free the slots of an item; do nothing if it is not cached."""
        with self._lock:
            self._evicted.extend(self._cached.pop(key, ()))
            self._reclaim()

    def clear(self) -> None:
        """Evict everything and free the memory."""
        with self._lock:
            self._reset()

    def _reclaim(self) -> None:
        """Free the evicted slots that no lease protects any more."""
        if not self._evicted:
            return
        leased = {slot for lease in list(self._leases) for slot in lease.slots}
        self._free.extend(slot for slot in self._evicted if slot not in leased)
        self._evicted = [slot for slot in self._evicted if slot in leased]

    # ---------------------------------------------------------------- adapters with parameters

    def current_item(
        self, name: str, weights: LayerWeights, sites: tuple[EditSite, ...]
    ) -> CacheItem:
        """Return the item of an adapter whose parameters may change.

        A new ``weights`` object gets a new key, and the old weights are evicted.
        """
        with self._lock:
            item = self._current.get(name)
            if item is None or item.weights is not weights:
                self.forget(name)
                self._versions += 1  # never the same key for other values
                item = CacheItem((f"parameters of {name}", self._versions), weights, sites)
                self._current[name] = item
            return item

    def forget(self, name: str) -> None:
        """Evict an adapter whose parameters may change."""
        item = self._current.pop(name, None)
        if item is not None:
            self.evict(item.key)

    # ---------------------------------------------------------------- use

    def weights_at(self, site: EditSite, kind: EditKind) -> EditWeights:
        """Return the weights of all slots of a site, (E, r, D) and (E, r).

        Raises:
            KeyError: no cached adapter has edited this site in this way.
        """
        layer = self._layers[site, kind]
        return EditWeights(layer.encode, layer.bias, layer.decode, kind.subtract, kind.activation)

    def temporary(self, capacity: int) -> AdapterCache:
        """Make an empty cache on the same devices, for one batch that needs more than fits here."""
        return AdapterCache(capacity, self._device_of)

    # ---------------------------------------------------------------- memory

    def _load(self, item: CacheItem) -> None:
        rank = item.weights[0].decode.shape[1]
        self._grow(self._num_slots - len(self._free) + item.groups, item.kind, rank)
        slots = tuple(self._free.pop() for _ in range(item.groups))
        numbers = torch.tensor(slots)
        for site, weights in zip(item.sites, item.weights, strict=True):
            layer = self._layer(site, item.kind, weights.decode.shape[-1])
            numbers = numbers.to(layer.bias.device)
            layer.write(numbers, weights)
        self._cached[item.key] = slots

    def _grow(self, slots: int, kind: EditKind, rank: int) -> None:
        """Make room for this many slots in all layers, and for this rank in those of ``kind``."""
        more_ranks = rank > self._ranks.get(kind, 0)
        if more_ranks:
            self._ranks[kind] = rank
        more_slots = slots > self._num_slots
        if more_slots:
            doubled = min(2 * self._num_slots, self.capacity)
            grown = max(slots, doubled, min(_FIRST_SLOTS, self.capacity))
            self._free.extend(reversed(range(self._num_slots, grown)))
            self._num_slots = grown
        for (site, layer_kind), layer in self._layers.items():
            if more_slots or (more_ranks and layer_kind == kind):
                enlarged = layer.enlarged(self._num_slots, self._ranks[layer_kind])
                self._layers[site, layer_kind] = enlarged

    def _layer(self, site: EditSite, kind: EditKind, dim: int) -> LayerSlots:
        """Return the slots of a site, allocated on first use."""
        if (site, kind) not in self._layers:
            shape = (self._num_slots, self._ranks[kind], dim)

            def zeros(*sizes: int) -> Tensor:
                return torch.zeros(sizes, dtype=kind.dtype, device=self._device_of(site))

            self._layers[site, kind] = LayerSlots(zeros(*shape), zeros(*shape[:2]), zeros(*shape))
        return self._layers[site, kind]
