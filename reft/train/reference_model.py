"""What a preference loss compares the model with: the model as it was when training began."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reft.adapter.multi_device import MultiDeviceParameters
from reft.adapter.parameters import AdapterParameters
from reft.adapter.tensor_checks import HEADS
from reft.io.adapter_files import read_adapter, write_adapter
from reft.model.modules_to_save import ModulesToSave, check_heads, head_state, load_heads
from reft.model.reft_model import ReftModel
from reft.model.registry import SUBMODULE
from reft.train.fsdp2 import is_sharded

#: The folder of a checkpoint that holds the adapter of the reference.
FOLDER = "reference"


@dataclass(frozen=True, eq=False)
class _Frozen:
    """A copy of an adapter that is not on the model: its bank, and a store of its heads."""

    name: str
    adapter: AdapterParameters | MultiDeviceParameters
    heads: ModulesToSave

    @classmethod
    def of(
        cls,
        name: str,
        adapter: AdapterParameters | MultiDeviceParameters,
        heads: Mapping[str, nn.Module],
    ) -> _Frozen:
        store = ModulesToSave()
        store.add(name, copy.deepcopy(dict(heads)))
        copied = copy.deepcopy(adapter).requires_grad_(False).eval()
        return cls(name, copied, store.requires_grad_(False).eval())

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The heads by path, while they are not in the base."""
        return self.heads.modules_of(nn.Module(), self.name)


class Reference(nn.Module):
    """A model whose active adapter has the values of the moment when :meth:`take` was called, as a
    module without parameters of its own.

    There is one base: while the reference runs, the copy stands in the place of the adapter.

    Raises:
        ValueError: no adapter is active, or an engine holds it in parts.
    """

    def __init__(self, model: ReftModel) -> None:
        super().__init__()
        # In tuples, so that they are no submodules: who moves or prepares the reference leaves the
        # model alone.
        self._model = (model,)
        self._taken: tuple[_Frozen, ...] = ()
        self._base_alone = False

    @property
    def config(self) -> Any:
        """The base's."""
        return self._model[0].config

    @torch.no_grad()
    def take(self) -> None:
        """Copy the active adapter, unless that was done; to be called by all ranks."""
        if self._taken or self._base_alone:
            return
        (model,) = self._model
        name = model.active_adapter
        if name is None:
            raise ValueError("model must have an active adapter: call set_adapter")
        if is_sharded(model._registry.adapters[name]):
            raise ValueError(
                "model must not be sharded by an earlier trainer, of which the reference would "
                "have a part: save the adapter and load it on a base that is whole"
            )
        model.broadcast_adapters()
        self._taken = (self._copy(name),)

    def _copy(self, name: str) -> _Frozen:
        (model,) = self._model
        registry, base = model._registry, model.get_base_model()
        return _Frozen.of(name, registry.adapter(name), registry.heads.modules_of(base, name))

    @contextmanager
    def _acting(self) -> Iterator[nn.Module]:
        """Inside, the base computes what the reference does."""
        self.take()
        (model,) = self._model
        base = model.get_base_model()
        if self._base_alone:
            with model.disable_adapter():
                yield base
            return
        registry, (frozen,) = model._registry, self._taken
        name, before = frozen.name, registry.active
        present = registry.adapters[name], registry.heads
        _follow(frozen, registry.adapter(name), registry.heads.modules_of(base, name))
        registry.show_heads(base, None)
        registry.adapters[name], registry.heads, registry.active = (
            frozen.adapter,
            frozen.heads,
            name,
        )
        registry.show_heads(base, name)
        try:
            yield base
        finally:
            registry.show_heads(base, None)
            registry.adapters[name], registry.heads = present
            registry.active = before
            registry.show_heads(base, before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward. Whatever is put around :attr:`forward` is in the base's already."""
        with self._acting() as base:
            return base(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same."""
        return self(*args, **kwargs)

    def state_dict(self, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The base's and the copy's, whatever the model has learnt since: by it TRL tells one
        reference from another."""
        with self._acting() as base:
            state = base.state_dict()
        values = {
            name: value for name, value in state.items() if not name.startswith(f"{SUBMODULE}.")
        }
        for frozen in self._taken:
            text = frozen.adapter.config.to_json().encode()
            copied = frozen.adapter.training_state()
            values |= {f"{FOLDER}.{name}": value for name, value in copied.items()}
            values[f"{FOLDER}.config"] = torch.tensor(list(text), dtype=torch.uint8)
        return values

    # ---------------------------------------------------------------- in checkpoints

    def save(self, checkpoint: str | os.PathLike[str]) -> None:
        """Write the copy into a folder of a checkpoint.

        Raises:
            OSError: it cannot be written.
        """
        self.take()
        for frozen in self._taken:
            heads = {HEADS + key: value for key, value in head_state(frozen.modules).items()}
            tensors = frozen.adapter.training_state() | heads
            write_adapter(Path(checkpoint) / FOLDER, frozen.adapter.config, tensors)

    def read(self, checkpoint: str | os.PathLike[str], fixed: bool) -> _Frozen | None:
        """The reference of the run that wrote a checkpoint, to be handed to :meth:`set`; None for
        the base, as of runs that kept no copy.

        Args:
            checkpoint: its folder.
            fixed: the present reference is in use already and cannot be replaced.

        Raises:
            OSError, ValueError: a damaged file, another kind of adapter, or another one than the
                present where that is ``fixed``.
        """
        self.take()
        folder = Path(checkpoint) / FOLDER
        stored = self._stored(folder) if folder.is_dir() else None
        present = self._taken[0] if self._taken else None
        if fixed and not _same(stored, present):
            raise ValueError(
                "precompute_ref_log_probs used another reference than that of the run which wrote "
                f"{os.fspath(checkpoint)}: resume with the adapter on the model that the run began "
                "with, or with precompute_ref_log_probs=False"
            )
        return stored

    def set(self, stored: _Frozen | None) -> None:
        """Take what :meth:`read` returned for the reference."""
        self._taken = () if stored is None else (stored,)
        self._base_alone = stored is None

    def _stored(self, folder: Path) -> _Frozen:
        (model,) = self._model
        name = model.active_adapter
        assert name is not None
        config, tensors = read_adapter(folder)
        # The adapter itself may be in parts by now.
        present = self._taken[0] if self._taken else self._copy(name)
        made = _Frozen.of(name, present.adapter, present.modules)
        if config != made.adapter.config:
            raise ValueError(
                f"{folder} must hold an adapter of the configuration of {name!r}, which is trained "
                "against it; it has another"
            )
        heads = {
            key.removeprefix(HEADS): value
            for key, value in tensors.items()
            if key.startswith(HEADS)
        }
        edit = {key: value for key, value in tensors.items() if not key.startswith(HEADS)}
        try:
            check_heads(made.modules, heads)
            made.adapter.load(edit, training_state=True)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        load_heads(made.modules, heads)
        return made


def _follow(
    frozen: _Frozen,
    adapter: AdapterParameters | MultiDeviceParameters,
    heads: Mapping[str, nn.Module],
) -> None:
    """Bring a copy to where the adapter went since, and its heads to the base's dtype."""
    if isinstance(adapter, AdapterParameters) and frozen.adapter.bias.device != adapter.bias.device:
        frozen.adapter.to(adapter.bias.device)
    for path, copied in frozen.modules.items():
        pairs = zip(copied.parameters(), heads[path].parameters(), strict=True)
        if any(old.device != new.device or old.dtype != new.dtype for old, new in pairs):
            present = next(heads[path].parameters())
            copied.to(present.device, present.dtype)


def _same(stored: _Frozen | None, present: _Frozen | None) -> bool:
    if stored is None or present is None:
        return stored is present
    ours, theirs = stored.adapter.export_state_dict(), present.adapter.export_state_dict()
    return all(
        torch.allclose(value, theirs[key].to(value), rtol=1e-4, atol=1e-5)
        for key, value in ours.items()
    )
