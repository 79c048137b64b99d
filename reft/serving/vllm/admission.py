"""The front end's part: names become contents, and what cannot be served is refused here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from reft.model.checkpoint import WEIGHTS_FILE, read_adapter
from reft.serving.stored import stored
from reft.serving.vllm.settings import Settings
from reft.serving.vllm.tickets import Ticket

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
                the engine cannot serve.
        """
        folder = self._folder(name)
        try:
            state = _state(folder / WEIGHTS_FILE)
            known = self._known.get(name)
            if known is None or known[0] != state:
                known = self._known[name] = (state, self._read(name, folder))
        except OSError as error:
            self._known.pop(name, None)
            raise ValueError(f"adapter {name!r} cannot be read: {error.strerror}") from None
        return Ticket(known[1].content, scale, known[1].where)

    def _folder(self, name: str) -> Path:
        plain = name and name not in (".", "..") and not set(name) & set("/\\\0")
        if not plain or name.startswith("."):
            raise ValueError(f"reft must name an adapter, a folder's plain name; got {name!r}")
        folder = Path(self.settings.folder) / name
        if not folder.is_dir():
            raise ValueError(f"there is no adapter {name!r}")
        return folder

    def _read(self, name: str, folder: Path) -> Ticket:
        # A copy first: what is read, hashed and handed to the workers is one file.
        cache = self.settings.cache_folder
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = cache / f".{os.getpid()}.{name}.tmp"
        beside.mkdir(exist_ok=True)
        try:
            shutil.copyfile(folder / WEIGHTS_FILE, beside / WEIGHTS_FILE)
            if (folder / "adapter_config.json").is_file():
                shutil.copyfile(folder / "adapter_config.json", beside / "adapter_config.json")
            config, tensors = read_adapter(beside)
            self._check(config.rank, config.component, config.positions)
            one = stored(config, tensors, num_layers=self.num_layers, dim=self.dim)
            target = cache / one.content
            if not target.is_dir():
                try:
                    beside.replace(target)
                except OSError:  # another front end was faster
                    if not target.is_dir():
                        raise
        except ValueError as error:
            reason = str(error).removeprefix(f"{beside}: ").replace(str(beside), repr(name))
            raise ValueError(f"adapter {name!r} cannot be served: {reason}") from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return Ticket.of(config, one.content, 1.0)

    def _check(self, rank: int, component: str, positions: str) -> None:
        if rank > self.settings.max_rank:
            raise ValueError(
                f"rank must be at most max_rank = {self.settings.max_rank}, got {rank}"
            )
        if component != "block_output":
            raise ValueError(f'component must be "block_output", got {component!r}')
        if positions in _UNTOLD:
            raise ValueError(f'positions must not be "given" or "image", got "{positions}"')


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
