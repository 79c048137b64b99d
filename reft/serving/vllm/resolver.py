"""The front end's part: names become contents, and what cannot be served is refused here."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

from reft.adapter.host_adapter import stored
from reft.config import ReftConfig
from reft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from reft.serving.vllm.request_adapter import SCALE, Ticket
from reft.serving.vllm.settings import Settings

#: Positions that a request of token ids does not tell.
_UNTOLD = ("given", "image")


class Admission:
    """Adapters by name, as they lie in the folder now.

    Args:
        settings: of the engine.
        num_layers: blocks of the model.
        dim: D, the width of its residual stream.
    """

    def __init__(self, settings: Settings, num_layers: int, dim: int) -> None:
        self.settings, self.num_layers, self.dim = settings, num_layers, dim
        self._known: dict[str, tuple[tuple[int, ...], Ticket]] = {}

    def ticket(self, name: str, scale: float = 1.0) -> Ticket:
        """The ticket of an adapter, copied to where workers read it.

        Raises:
            ValueError: an unknown name or one that is no name, a damaged folder, an adapter that
                the engine cannot serve, a scale beyond the allowed.
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
            state = _state(folder / WEIGHTS_FILE)
            known = self._known.get(name)
            if known is None or known[0] != state or not self._copied(known[1].content, state):
                known = self._known[name] = (state, self._read(name, folder))
        except OSError as error:
            self._known.pop(name, None)
            raise ValueError(f"adapter {name!r} cannot be read: {error.strerror}") from None
        return Ticket(known[1].content, scale, known[1].where)

    def _folder(self, name: str) -> Path:
        plain = name and name not in (".", "..") and not set(name) & set("/\\\0")
        if not plain or name.startswith(".") or len(name.encode()) > 200:
            raise ValueError(f"reft must name an adapter, a folder's plain name; got {name!r:.80}")
        return Path(self.settings.folder) / name

    def _copied(self, content: str, state: tuple[int, ...]) -> bool:
        """Whether the workers' copy is there, and whole."""
        path = self.settings.cache_folder / content / WEIGHTS_FILE
        return path.is_file() and path.stat().st_size == state[1]

    def _read(self, name: str, folder: Path) -> Ticket:
        # A copy first: what is read, hashed and handed to the workers is one file.
        cache = self.settings.cache_folder
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".", dir=cache))
        try:
            for file in (WEIGHTS_FILE, CONFIG_FILE):
                if (folder / file).is_file():
                    _copy(folder / file, beside / file)
            config, tensors = read_adapter(beside)
            self._check(config)
            one = stored(config, tensors, num_layers=self.num_layers, dim=self.dim)
            target = cache / one.content
            if not self._copied(one.content, _state(beside / WEIGHTS_FILE)):
                shutil.rmtree(target, ignore_errors=True)  # cut short, or cleaned in part
                try:
                    beside.replace(target)
                except OSError:  # another front end was faster
                    if not self._copied(one.content, _state(beside / WEIGHTS_FILE)):
                        raise
        except (ValueError, RecursionError) as error:
            reason = str(error).removeprefix(f"{beside}: ").replace(str(beside), repr(name))
            raise ValueError(f"adapter {name!r} cannot be served: {reason}") from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return Ticket.of(config, one.content, 1.0)

    def _check(self, config: ReftConfig) -> None:
        if config.rank > self.settings.max_rank:
            raise ValueError(
                f"rank must be at most max_rank = {self.settings.max_rank}, got {config.rank}"
            )
        if config.component != "block_output":
            raise ValueError(f'component must be "block_output", got {config.component!r}')
        if config.positions in _UNTOLD:
            raise ValueError(f'positions must not be "given" or "image", got "{config.positions}"')
        if config.torch_dtype == torch.float64:
            raise ValueError('dtype must not be "float64"')


def _copy(source: Path, target: Path) -> None:
    """Copy a file onto the disk, not only into its cache."""
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
