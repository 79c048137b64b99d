"""Adapters by name in host memory, for inference with batches that mix them."""

from __future__ import annotations

import os
from types import MappingProxyType
from typing import Protocol

import torch

from reft.adapter.device_cache import AdapterCache, EditSite
from reft.adapter.host_adapter import HostAdapter, read_host_adapter
from reft.adapter.locks import Lock
from reft.config import ReftConfig

#: Default number of adapters on the device at once.
CAPACITY = 64


class Host(Protocol):
    """The model of a pool, as the pool needs it."""

    @property
    def num_layers(self) -> int: ...

    @property
    def dim(self) -> int: ...

    def device_of(self, site: EditSite) -> torch.device: ...

    def check_new_name(self, name: str) -> None:
        """Raise ValueError if an adapter may not get this name."""

    def check_config(self, config: ReftConfig) -> None:
        """Raise ValueError if the model cannot be edited in this way."""

    def check_origin(self, path: str | os.PathLike[str], config: ReftConfig) -> None:
        """Warn if the adapter was trained for another base model."""

    def pool_changed(self) -> None:
        """Update the hooks after adapters were added or removed."""


class AdapterPool:
    """Adapters for inference, thousands of them in host memory and a few on the device at a time.

    ``adapter_names`` of a forward or of ``generate`` may name them beside the adapters that were
    loaded with ``load_adapter``. Adapters of the pool cannot be trained.

    Attributes:
        cache: the adapters on the device.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._adapters: dict[str, HostAdapter] = {}
        self._lock = Lock()
        self.cache = AdapterCache(CAPACITY, host.device_of)

    # ---------------------------------------------------------------- names

    def add(self, name: str, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Read an adapter's folder and keep the adapter under a name.

        A generation in progress continues with the adapter that it started with.

        Args:
            name: new among the model's adapters, unless ``replace``.
            path: a folder that ``save_pretrained`` wrote.
            replace: replace the pool's adapter of this name, if there is one.

        Raises:
            OSError: no such folder, or no adapter in it.
            ValueError: a name that is taken or not allowed, a damaged file, an adapter that does
                not fit the model or has ``modules_to_save``. Nothing was changed.
        """
        if not (replace and name in self._adapters):
            self._host.check_new_name(name)
        adapter = read_host_adapter(path, num_layers=self._host.num_layers, dim=self._host.dim)
        try:
            self._host.check_config(adapter.config)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None
        with self._lock:
            replaced = self._adapters.get(name)
            if replaced is None:
                self._host.check_new_name(name)
            self._adapters[name] = adapter
            if replaced is not None:
                self._evict(replaced)
            self._host.pool_changed()
        self._host.check_origin(path, adapter.config)

    def remove(self, name: str) -> None:
        """Remove an adapter from host memory and from the device.

        Raises:
            ValueError: the pool has no adapter of this name.
        """
        with self._lock:
            if name not in self:
                raise ValueError(
                    f"name must be one of the pool's {len(self)} adapters, got {name!r}"
                )
            self._evict(self._adapters.pop(name))
            self._host.pool_changed()

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._adapters

    @property
    def names(self) -> list[str]:
        """Names of all adapters, oldest first."""
        return list(self._adapters)

    @property
    def adapters(self) -> MappingProxyType[str, HostAdapter]:
        """Adapters by name, read-only."""
        return MappingProxyType(self._adapters)

    # ---------------------------------------------------------------- sizes

    @property
    def capacity(self) -> int:
        """The number of adapters that may be on the device at once, and so in one batch. It may be
        set. The least recently used adapters are evicted."""
        return self.cache.capacity

    @capacity.setter
    def capacity(self, value: int) -> None:
        self.cache.capacity = value

    @property
    def resident(self) -> list[str]:
        """Names of the adapters that are on the device now."""
        hashes = {key[0] for key in self.cache.keys}
        return [name for name, adapter in self._adapters.items() if adapter.content_hash in hashes]

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        sizes = {adapter.content_hash: adapter.nbytes for adapter in self._adapters.values()}
        return sum(sizes.values())

    @property
    def resident_nbytes(self) -> int:
        """Bytes on the device, free slots included."""
        return self.cache.nbytes

    def _evict(self, adapter: HostAdapter) -> None:
        """Evict an adapter that has no name any more from the device."""
        if any(other.content_hash == adapter.content_hash for other in [*self._adapters.values()]):
            return
        for key in self.cache.keys:
            if key[0] == adapter.content_hash:
                self.cache.evict(key)
