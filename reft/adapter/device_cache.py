"""Adapters on the device: tables of A, b and R that one call of the operator picks entries of.

A table holds E entries, (E, r, D), for one place in the model. An adapter that is resident owns one
entry for each of its sets of weights, the same numbers in the tables of all its layers. Ranks are
padded with zeros to the table's: a row of zeros in R adds nothing. When there is no room, the
adapters that were used longest ago go.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reft.adapter.edit_weights import LayerWeights, num_bytes
from reft_kernels.spec import EditWeights

#: Where an edit acts: block number and component.
EditSite = tuple[int, str]

#: Names what is resident: its content, and what else decides which edit that is.
Key = tuple[str, object]


class EditKind(NamedTuple):
    """What edits must share to be done in one call."""

    subtract: bool
    activation: str | None
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class CacheItem:
    """What is asked to be on the device.

    Attributes:
        key: names the content: equal keys have equal edits, whatever adapter they came from.
        weights: A, b and R of each site, (g, r, D) and (g, r), wherever they lie.
        sites: where they act, in the order of ``weights``.
    """

    key: Key
    weights: LayerWeights
    sites: tuple[EditSite, ...]

    @property
    def kind(self) -> EditKind:
        first = self.weights[0]
        return EditKind(first.subtract, first.activation, first.decode.dtype)

    @property
    def groups(self) -> int:
        """Entries that it takes."""
        return self.weights[0].decode.shape[0]


@dataclass(eq=False)
class LayerSlots:
    """Parameters of one site: ``encode`` and ``decode`` (E, r, D), ``bias`` (E, r)."""

    encode: Tensor
    bias: Tensor
    decode: Tensor

    @property
    def nbytes(self) -> int:
        return num_bytes(EditWeights(self.encode, self.bias, self.decode))

    def grown(self, entries: int, rank: int) -> LayerSlots:
        """A larger table with the same values, zeros elsewhere."""
        more, wider = entries - self.bias.shape[0], rank - self.bias.shape[1]
        return LayerSlots(
            F.pad(self.encode, (0, 0, 0, wider, 0, more)),
            F.pad(self.bias, (0, wider, 0, more)),
            F.pad(self.decode, (0, 0, 0, wider, 0, more)),
        )

    def write(self, entries: Tensor, weights: EditWeights) -> None:
        """Set entries (g,) to A, R (g, r, D) and b (g, r), padded to the rank of the table."""
        missing = self.bias.shape[1] - weights.decode.shape[1]
        for target, value in zip((self.encode, self.bias, self.decode), weights[:3], strict=True):
            if value is None:
                target.index_fill_(0, entries, 0)
                continue
            pad = (0, missing) if value.ndim == 2 else (0, 0, 0, missing)
            target.index_copy_(0, entries, F.pad(value.to(target.device), pad))


class Lock:
    """A lock that a copied or pickled model gets anew."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


class Leases(weakref.WeakSet["Lease"]):
    """Those that live; a copied or pickled model has none."""

    def __reduce__(self) -> tuple[type[Leases], tuple[()]]:
        return Leases, ()


class Lease:
    """As long as it lives, its entries are given to nobody else."""

    def __init__(self, entries: Iterable[tuple[int, ...]]) -> None:
        self.entries = frozenset(number for group in entries for number in group)


class AdapterCache:
    """The adapters on the device. Several threads may use them while others change the pool: what
    forwards in progress together need beyond the capacity takes more entries for that time.

    Args:
        capacity: adapters that may be there at once, at least 1.
        device_of: site -> its device.

    Raises:
        ValueError: a capacity below 1.
    """

    def __init__(self, capacity: int, device_of: Callable[[EditSite], torch.device]) -> None:
        self.capacity = capacity
        self._lock = Lock()
        self._device_of = device_of
        self._tables: dict[tuple[EditSite, EditKind], LayerSlots] = {}
        self._used: OrderedDict[Key, tuple[tuple[int, ...], CacheItem]] = OrderedDict()
        self._free: list[int] = []
        self._leases = Leases()
        self._leased: list[int] = []  # given up, and still read by somebody
        self._entries, self._ranks = 0, dict[EditKind, int]()

    @property
    def capacity(self) -> int:
        """Adapters that may be resident at once. Lowered, it takes effect when the next one
        comes."""
        return self._capacity

    @capacity.setter
    def capacity(self, value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"capacity must be an integer of at least 1, got {value!r}")
        self._capacity = value

    @property
    def resident(self) -> list[Key]:
        """Keys of what is on the device, least recently used first."""
        return list(self._used)

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(table.nbytes for table in self._tables.values())

    def reserve(
        self, sites: Iterable[EditSite], kind: EditKind, *, entries: int, rank: int, dim: int
    ) -> None:
        """Allocate tables now, for engines whose graphs keep their addresses."""
        self._grow(entries, kind, rank)
        for site in sites:
            self._table(site, kind, dim)

    @torch.no_grad()
    def admit(self, wanted: Sequence[CacheItem]) -> list[tuple[int, ...]]:
        """Bring adapters onto the device, together.

        Args:
            wanted: of one batch; equal keys once or more.

        Returns:
            The entries of each, one a group.

        Raises:
            ValueError: more different ones than the capacity. Nothing was changed.
        """
        keys = {one.key for one in wanted}
        if len(keys) > self.capacity:
            raise ValueError(
                f"a batch may use at most {self.capacity} different adapters, the capacity of the "
                f"pool; this one uses {len(keys)}"
            )
        with self._lock:
            return self._admit(wanted, keys)

    def lease(self, wanted: Sequence[CacheItem]) -> tuple[list[tuple[int, ...]], Lease]:
        """:meth:`admit`, and what keeps the entries from being written until it is forgotten."""
        with self._lock:
            entries = self.admit(wanted)
            lease = Lease(entries)
            self._leases.add(lease)
            return entries, lease

    def _admit(self, wanted: Sequence[CacheItem], keys: set[Key]) -> list[tuple[int, ...]]:
        if self._leased:
            self._reclaim()
        missing = {one.key: one for one in wanted if one.key not in self._used}
        for key in keys & self._used.keys():
            self._used.move_to_end(key)
        over = len(self._used) + len(missing) - self.capacity
        for key in [key for key in self._used if key not in keys][: max(over, 0)]:
            self.drop(key)
        for one in missing.values():
            self._load(one)
        return [self._used[one.key][0] for one in wanted]

    def drop(self, key: Key) -> None:
        """Give up the entries of an adapter; nothing happens if it is not there."""
        with self._lock:
            entries, _ = self._used.pop(key, ((), None))
            self._leased.extend(entries)
            self._reclaim()

    def _reclaim(self) -> None:
        """Entries that were given up and that nobody reads any more are free."""
        read = {number for lease in list(self._leases) for number in lease.entries}
        self._free.extend(number for number in self._leased if number not in read)
        self._leased = [number for number in self._leased if number in read]

    def aside(self, capacity: int) -> AdapterCache:
        """Empty tables on the same devices, for one batch that needs more than fit here."""
        return AdapterCache(capacity, self._device_of)

    def clear(self) -> None:
        """Give up everything, memory too."""
        self.__init__(self.capacity, self._device_of)  # type: ignore[misc]

    def weights_at(self, site: EditSite, kind: EditKind) -> EditWeights:
        """Return the weights of all slots of a site, (E, r, D) and (E, r); there are some as soon
        as an adapter that edits it was admitted."""
        slots = self._tables[site, kind]
        return EditWeights(slots.encode, slots.bias, slots.decode, kind.subtract, kind.activation)

    # ---------------------------------------------------------------- filling

    def _load(self, one: CacheItem) -> None:
        rank = one.weights[0].decode.shape[1]
        self._grow(self._entries - len(self._free) + one.groups, one.kind, rank)
        entries = tuple(self._free.pop() for _ in range(one.groups))
        numbers = torch.tensor(entries)
        for site, weights in zip(one.sites, one.weights, strict=True):
            table = self._table(site, one.kind, weights.decode.shape[-1])
            numbers = numbers.to(table.bias.device)
            table.write(numbers, weights)
        self._used[one.key] = (entries, one)

    def _grow(self, entries: int, kind: EditKind, rank: int) -> None:
        """Make room for so many entries in all tables, of such a rank in those of ``kind``."""
        wider = rank > self._ranks.get(kind, 0)
        if wider:
            self._ranks[kind] = rank
        more = self._entries
        if entries > more:
            more = max(entries, min(2 * more, self.capacity), min(8, self.capacity))
            self._free.extend(reversed(range(self._entries, more)))
            longer, self._entries = True, more
        else:
            longer = False
        for (site, of), table in self._tables.items():
            if longer or (wider and of == kind):
                self._tables[site, of] = table.grown(more, self._ranks[of])

    def _table(self, site: EditSite, kind: EditKind, dim: int) -> LayerSlots:
        if (site, kind) not in self._tables:
            shape = (self._entries, self._ranks[kind], dim)
            device = self._device_of(site)

            def zeros(*sizes: int) -> Tensor:
                return torch.zeros(sizes, dtype=kind.dtype, device=device)

            self._tables[site, kind] = LayerSlots(zeros(*shape), zeros(*shape[:2]), zeros(*shape))
        return self._tables[site, kind]
