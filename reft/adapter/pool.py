"""Adapters by name in host memory, for batches that mix any of them."""

from __future__ import annotations

import os
from types import MappingProxyType
from typing import Protocol

import torch

from reft.adapter.device_cache import AdapterCache, CacheItem, EditSite, Lock
from reft.adapter.edit_weights import LayerWeights
from reft.adapter.host_adapter import HostAdapter, read_host_adapter
from reft.config import ReftConfig

#: Adapters on the device at once, unless said otherwise.
CAPACITY = 64


class Host(Protocol):
    """What a pool needs of the model that it serves."""

    @property
    def num_layers(self) -> int: ...

    @property
    def dim(self) -> int: ...

    def device_of(self, site: EditSite) -> torch.device: ...

    def check_new_name(self, name: str) -> None:
        """Raises ValueError."""

    def check_config(self, config: ReftConfig) -> None:
        """Raises ValueError."""

    def check_origin(self, path: str | os.PathLike[str], config: ReftConfig) -> None:
        """Warns where the adapter was made for another base."""

    def pool_changed(self) -> None:
        """Adapters came or went."""


class AdapterPool:
    """Adapters that are served, thousands of them; a few at a time are on the device.

    ``adapter_names`` of a forward or a ``generate`` may name them beside those that were loaded
    with ``load_adapter``. They are for inference: nothing of them is trained.

    Attributes:
        tables: what is on the device.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._stored: dict[str, HostAdapter] = {}
        self._banks: dict[str, CacheItem] = {}
        self._versions = 0
        self._lock = Lock()
        self.tables = AdapterCache(CAPACITY, host.device_of)

    # ---------------------------------------------------------------- names

    def add(self, name: str, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Read an adapter's folder and keep it under a name.

        A generation that is in progress goes on with the adapter that it started with.

        Args:
            name: new among the model's adapters, unless ``replace``.
            path: what ``save_pretrained`` wrote.
            replace: whether the pool may have an adapter of this name; it is replaced.

        Raises:
            OSError: no such folder, or no adapter in it.
            ValueError: a name that is taken or not allowed, a damaged file, an adapter that does
                not fit the model or has heads. Nothing was changed.
        """
        if not (replace and name in self._stored):
            self._host.check_new_name(name)
        one = read_host_adapter(path, num_layers=self._host.num_layers, dim=self._host.dim)
        try:
            self._host.check_config(one.config)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None
        with self._lock:
            old = self._stored.get(name)
            if old is None:
                self._host.check_new_name(name)
            self._stored[name] = one
            self._forget(old)
            self._host.pool_changed()
        self._host.check_origin(path, one.config)

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ValueError: there is none of this name in the pool.
        """
        with self._lock:
            if name not in self:
                raise ValueError(
                    f"name must be one of the pool's {len(self)} adapters, got {name!r}"
                )
            self._forget(self._stored.pop(name))
            self._host.pool_changed()

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._stored

    @property
    def names(self) -> list[str]:
        """All adapters, oldest first."""
        return list(self._stored)

    @property
    def adapters(self) -> MappingProxyType[str, HostAdapter]:
        """name -> what is kept of it, read-only."""
        return MappingProxyType(self._stored)

    # ---------------------------------------------------------------- sizes

    @property
    def capacity(self) -> int:
        """Adapters that may be on the device at once, and so in one batch; may be set. Those that
        were used longest ago make room."""
        return self.tables.capacity

    @capacity.setter
    def capacity(self, value: int) -> None:
        self.tables.capacity = value

    @property
    def resident(self) -> list[str]:
        """Names of those that are on the device now."""
        there = {key[0] for key in self.tables.resident}
        return [name for name, one in self._stored.items() if one.content in there]

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        return sum({one.content: one.nbytes for one in self._stored.values()}.values())

    @property
    def resident_nbytes(self) -> int:
        """Bytes of the tables on the device, free entries included."""
        return self.tables.nbytes

    # ---------------------------------------------------------------- adapters with parameters

    def of_bank(self, name: str, weights: LayerWeights, sites: tuple[EditSite, ...]) -> CacheItem:
        """What is asked for an adapter of the model itself, whose values may change: as long as
        ``weights`` is the same object, they did not."""
        with self._lock:
            known = self._banks.get(name)
            if known is None or known.weights is not weights:
                self.forget_bank(name)
                self._versions += 1  # never the same key for other values
                known = CacheItem((f"bank {name}", self._versions), weights, sites)
                self._banks[name] = known
            return known

    def forget_bank(self, name: str) -> None:
        """Free the entries of an adapter of the model itself."""
        known = self._banks.pop(name, None)
        if known is not None:
            self.tables.drop(known.key)

    def _forget(self, one: HostAdapter | None) -> None:
        """Free the entries of an adapter that has no name any more."""
        if one is None or any(
            other.content == one.content for other in list(self._stored.values())
        ):
            return
        for key in self.tables.resident:
            if key[0] == one.content:
                self.tables.drop(key)
