"""Reference model of a preference loss: the model with the adapter it had when training began."""

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
from reft.adapter.tensor_checks import MODULES_PREFIX
from reft.io.adapter_files import read_adapter, write_adapter
from reft.model.modules_to_save import (
    ModulesToSave,
    check_module_tensors,
    load_module_tensors,
    module_tensors,
)
from reft.model.reft_model import ReftModel
from reft.model.registry import SUBMODULE
from reft.train.fsdp2 import is_sharded

#: The folder of a checkpoint that holds the adapter of the reference.
FOLDER = "reference"


@dataclass(frozen=True, eq=False)
class _AdapterCopy:
    """A frozen copy of an adapter that is not on the model.

    Attributes:
        name: the adapter's name on the model.
        adapter: its parameters.
        modules_to_save: the store of its modules_to_save.
    """

    name: str
    adapter: AdapterParameters | MultiDeviceParameters
    modules_to_save: ModulesToSave

    @classmethod
    def of(
        cls,
        name: str,
        adapter: AdapterParameters | MultiDeviceParameters,
        modules: Mapping[str, nn.Module],
    ) -> _AdapterCopy:
        store = ModulesToSave()
        store.add(name, copy.deepcopy(dict(modules)))
        copied = copy.deepcopy(adapter).requires_grad_(False).eval()
        return cls(name, copied, store.requires_grad_(False).eval())

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules_to_save by path, while they are not in the base."""
        return self.modules_to_save.modules_of(nn.Module(), self.name)


class ReferenceModel(nn.Module):
    """A module without parameters that computes with the adapter as it was when
    :meth:`copy_adapter` was called.

    The base model is shared: the copy replaces the adapter while the reference runs.

    Raises:
        ValueError: no adapter is active, or the adapter is sharded.
    """

    def __init__(self, model: ReftModel) -> None:
        super().__init__()
        # Tuples hide both from nn.Module: moving or preparing the reference leaves the model alone.
        self._model = (model,)
        self._copies: tuple[_AdapterCopy, ...] = ()
        self._is_base = False

    @property
    def config(self) -> Any:
        """The configuration of the base model."""
        return self._model[0].config

    @torch.no_grad()
    def copy_adapter(self) -> None:
        """Copy the active adapter, unless there is a reference already; call it on all ranks."""
        if self._copies or self._is_base:
            return
        (model,) = self._model
        name = model.active_adapter
        if name is None:
            raise ValueError("model must have an active adapter: call set_adapter")
        if is_sharded(model._registry.adapters[name]):
            raise ValueError(
                "model must not be sharded by an earlier trainer, because the reference would copy "
                "one shard: save the adapter and load it on an unsharded base"
            )
        model.broadcast_adapters()
        self._copies = (self._copy(name),)

    def _copy(self, name: str) -> _AdapterCopy:
        (model,) = self._model
        registry, base = model._registry, model.get_base_model()
        return _AdapterCopy.of(
            name, registry.adapter(name), registry.modules_to_save.modules_of(base, name)
        )

    @contextmanager
    def _active(self) -> Iterator[nn.Module]:
        """Yield the base model, which computes the reference inside."""
        self.copy_adapter()
        (model,) = self._model
        base = model.get_base_model()
        if self._is_base:
            with model.disable_adapter():
                yield base
            return
        registry, (reference,) = model._registry, self._copies
        name, before = reference.name, registry.active
        present = registry.adapters[name], registry.heads
        _match_placement(
            reference, registry.adapter(name), registry.modules_to_save.modules_of(base, name)
        )
        registry.activate_modules(base, None)
        registry.adapters[name], registry.heads, registry.active = (
            reference.adapter,
            reference.modules_to_save,
            name,
        )
        registry.activate_modules(base, name)
        try:
            yield base
        finally:
            registry.activate_modules(base, None)
            registry.adapters[name], registry.heads = present
            registry.active = before
            registry.activate_modules(base, before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base's forward. Patches of :attr:`forward` are skipped: the base's forward has
        them already."""
        with self._active() as base:
            return base(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base's forward, see :meth:`__call__`."""
        return self(*args, **kwargs)

    def state_dict(self, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the state dict of the base and the copied adapter, which does not change while
        the model is trained. TRL hashes it to recognise a reference."""
        with self._active() as base:
            state = base.state_dict()
        values = {
            name: value for name, value in state.items() if not name.startswith(f"{SUBMODULE}.")
        }
        for reference in self._copies:
            text = reference.adapter.config.to_json().encode()
            copied = reference.adapter.training_state()
            values |= {f"{FOLDER}.{name}": value for name, value in copied.items()}
            values[f"{FOLDER}.config"] = torch.tensor(list(text), dtype=torch.uint8)
        return values

    # ---------------------------------------------------------------- in checkpoints

    def save(self, checkpoint: str | os.PathLike[str]) -> None:
        """Write the copy into a folder of a checkpoint.

        Raises:
            OSError: the folder cannot be written.
        """
        self.copy_adapter()
        for reference in self._copies:
            modules = {
                MODULES_PREFIX + key: value
                for key, value in module_tensors(reference.modules).items()
            }
            tensors = reference.adapter.training_state() | modules
            write_adapter(Path(checkpoint) / FOLDER, reference.adapter.config, tensors)

    def read(self, checkpoint: str | os.PathLike[str], precomputed: bool) -> _AdapterCopy | None:
        """Read the reference of the run that wrote a checkpoint, for :meth:`set`.

        Args:
            checkpoint: its folder.
            precomputed: whether the present reference was used already and cannot be replaced.

        Returns:
            The reference; None for the base model, the reference of runs that saved no copy.

        Raises:
            OSError, ValueError: a damaged file; another kind of adapter; or, if ``precomputed``, an
                adapter other than the present reference.
        """
        self.copy_adapter()
        folder = Path(checkpoint) / FOLDER
        stored = self._read_copy(folder) if folder.is_dir() else None
        present = self._copies[0] if self._copies else None
        if precomputed and not _is_same(stored, present):
            raise ValueError(
                "precompute_ref_log_probs used another reference than that of the run which wrote "
                f"{os.fspath(checkpoint)}: resume with the adapter on the model that the run began "
                "with, or with precompute_ref_log_probs=False"
            )
        return stored

    def set(self, stored: _AdapterCopy | None) -> None:
        """Use the reference that :meth:`read` returned."""
        self._copies = () if stored is None else (stored,)
        self._is_base = stored is None

    def _read_copy(self, folder: Path) -> _AdapterCopy:
        (model,) = self._model
        name = model.active_adapter
        assert name is not None
        config, tensors = read_adapter(folder)
        # The adapter on the model may be sharded by now; the copy is not.
        present = self._copies[0] if self._copies else self._copy(name)
        reference = _AdapterCopy.of(name, present.adapter, present.modules)
        if config != reference.adapter.config:
            raise ValueError(
                f"{folder} must hold an adapter with the configuration of {name!r}, whose "
                "reference it is; it has another configuration"
            )
        modules = {
            key.removeprefix(MODULES_PREFIX): value
            for key, value in tensors.items()
            if key.startswith(MODULES_PREFIX)
        }
        edit = {key: value for key, value in tensors.items() if not key.startswith(MODULES_PREFIX)}
        try:
            check_module_tensors(reference.modules, modules)
            reference.adapter.load(edit, training_state=True)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        load_module_tensors(reference.modules, modules)
        return reference


def _match_placement(
    reference: _AdapterCopy,
    adapter: AdapterParameters | MultiDeviceParameters,
    modules: Mapping[str, nn.Module],
) -> None:
    """Move a copy to the adapter's present device, and its modules_to_save to their present device
    and dtype."""
    copied_bias = reference.adapter.bias
    if isinstance(adapter, AdapterParameters) and copied_bias.device != adapter.bias.device:
        reference.adapter.to(adapter.bias.device)
    for path, copied in reference.modules.items():
        pairs = zip(copied.parameters(), modules[path].parameters(), strict=True)
        if any(old.device != new.device or old.dtype != new.dtype for old, new in pairs):
            present = next(modules[path].parameters())
            copied.to(present.device, present.dtype)


def _is_same(stored: _AdapterCopy | None, present: _AdapterCopy | None) -> bool:
    if stored is None or present is None:
        return stored is present
    ours, theirs = stored.adapter.export_state_dict(), present.adapter.export_state_dict()
    return all(
        torch.allclose(value, theirs[key].to(value), rtol=1e-4, atol=1e-5)
        for key, value in ours.items()
    )
