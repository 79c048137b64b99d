"""Resolution of adapter names in the front end; adapters that cannot be served are refused here."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

from reft.adapter.host_adapter import host_adapter
from reft.config import ReftConfig
from reft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from reft.serving.vllm.request_adapter import SCALE, RequestAdapter
from reft.serving.vllm.settings import Settings

#: Positions that do not follow from a request's token ids.
_UNSUPPORTED_POSITIONS = ("given", "image")


class Resolver:
    """Resolves names to the adapters that are in the engine's folder at this moment.

    Args:
        settings: of the engine.
        num_layers: blocks of the model.
        dim: D, the width of its residual stream.
    """

    def __init__(self, settings: Settings, num_layers: int, dim: int) -> None:
        self.settings, self.num_layers, self.dim = settings, num_layers, dim
        self._resolved: dict[str, tuple[tuple[int, ...], RequestAdapter]] = {}

    def resolve(self, name: str, scale: float = 1.0) -> RequestAdapter:
        """Resolve a name, and copy the adapter to the folder that the workers read.

        Raises:
            ValueError: an unknown or invalid name, a damaged folder, an adapter that the engine
                cannot serve, a scale above the limit.
        """
        if abs(scale) > self.settings.max_scale:
            raise ValueError(
                f"{SCALE} must lie within ±{self.settings.max_scale:g}, the max_scale of this "
                f"engine; got {scale:g}"
            )
        folder = self._folder(name)
        try:
            if not folder.is_dir():
                raise ValueError(f"there is no adapter {name!r}")
            state = _file_state(folder / WEIGHTS_FILE)
            known_state, adapter = self._resolved.get(name, (None, None))
            if (
                adapter is None
                or known_state != state
                or not self._is_copied(adapter.content_hash, state)
            ):
                adapter = self._read(name, folder)
                self._resolved[name] = state, adapter
        except OSError as error:
            self._resolved.pop(name, None)
            raise ValueError(f"adapter {name!r} cannot be read: {error.strerror}") from None
        return RequestAdapter(adapter.content_hash, scale, adapter.position_fields)

    def _folder(self, name: str) -> Path:
        is_plain = name and name not in (".", "..") and not set(name) & set("/\\\0")
        if not is_plain or name.startswith(".") or len(name.encode()) > 200:
            raise ValueError(f"reft must name an adapter, a folder's plain name; got {name!r:.80}")
        return Path(self.settings.folder) / name

    def _is_copied(self, content_hash: str, state: tuple[int, ...]) -> bool:
        """Whether the workers' copy exists and is complete."""
        path = self.settings.cache_folder / content_hash / WEIGHTS_FILE
        return path.is_file() and path.stat().st_size == state[1]

    def _read(self, name: str, folder: Path) -> RequestAdapter:
        # Copy first: the file that is checked and hashed must be the one that the workers read.
        cache = self.settings.cache_folder
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        copy = Path(tempfile.mkdtemp(prefix=".", dir=cache))
        try:
            for file in (WEIGHTS_FILE, CONFIG_FILE):
                if (folder / file).is_file():
                    _copy_durably(folder / file, copy / file)
            config, tensors = read_adapter(copy)
            self._check(config)
            adapter = host_adapter(config, tensors, num_layers=self.num_layers, dim=self.dim)
            content_hash = adapter.content_hash
            target = cache / content_hash
            if not self._is_copied(content_hash, _file_state(copy / WEIGHTS_FILE)):
                shutil.rmtree(target, ignore_errors=True)  # truncated or partly deleted
                try:
                    copy.replace(target)
                except OSError:  # another front end was faster
                    if not self._is_copied(content_hash, _file_state(copy / WEIGHTS_FILE)):
                        raise
        except (ValueError, RecursionError) as error:
            reason = str(error).removeprefix(f"{copy}: ").replace(str(copy), repr(name))
            raise ValueError(f"adapter {name!r} cannot be served: {reason}") from None
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        return RequestAdapter.from_config(config, content_hash, 1.0)

    def _check(self, config: ReftConfig) -> None:
        if config.rank > self.settings.max_rank:
            raise ValueError(
                f"rank must be at most max_rank = {self.settings.max_rank}, got {config.rank}"
            )
        if config.component != "block_output":
            raise ValueError(f'component must be "block_output", got {config.component!r}')
        if config.positions in _UNSUPPORTED_POSITIONS:
            raise ValueError(f'positions must not be "given" or "image", got "{config.positions}"')
        if config.torch_dtype == torch.float64:
            raise ValueError('dtype must not be "float64"')


def _copy_durably(source: Path, target: Path) -> None:
    """Copy a file and wait until the copy is on disk."""
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())


def _file_state(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is replaced."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
