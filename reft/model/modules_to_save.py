"""Modules of the base that an adapter trains in full, PEFT's ``modules_to_save``.

The active adapter's copies replace the original modules in the base model. The originals and the
copies of other adapters are stored here, frozen. Each module is in exactly one place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reft.adapter.sharding import copy_full_tensor, gathered
from reft.adapter.tensor_checks import check_numbers
from reft.config import FLOATS


class ModulesToSave(nn.Module):
    """The stored modules: those that are not in the base model at the moment.

    Attributes:
        waiting: the stored modules; the name is part of state dict keys.
        active: the adapter whose copies are in the base model, or None for the originals.
        paths: adapter -> paths of its modules in the base model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting = nn.ModuleDict()
        self.active: str | None = None
        self.paths: dict[str, tuple[str, ...]] = {}

    def add(self, name: str, copies: Mapping[str, nn.Module]) -> None:
        """Store an adapter's modules, given by their path in the base model."""
        self.paths[name] = tuple(copies)
        for path, module in copies.items():
            self.waiting[_key(name, path)] = module

    def remove(self, base: nn.Module, name: str) -> None:
        """Drop an adapter's modules; if they are in the base model, put the originals back."""
        if self.active == name:
            self.activate(base, None)
        for path in self.paths.pop(name):
            del self.waiting[_key(name, path)]

    def activate(self, base: nn.Module, name: str | None) -> None:
        """Put an adapter's copies into the base model, or the originals for None."""
        if name == self.active:
            return
        if self.active is not None:
            self._swap(base, self.active, store_as=self.active, insert=None)
        if name is not None:
            self._swap(base, name, store_as=None, insert=name)
        self.active = name

    def _swap(
        self, base: nn.Module, adapter: str, *, store_as: str | None, insert: str | None
    ) -> None:
        """Exchange modules at an adapter's paths: the present ones become those of ``store_as``,
        and those of ``insert`` replace them. None stands for the originals."""
        for path in self.paths[adapter]:
            present, key = base.get_submodule(path), _key(insert, path)
            _set(base, path, self.waiting[key])
            del self.waiting[key]
            self.waiting[_key(store_as, path)] = present

    def modules_of(self, base: nn.Module, name: str) -> dict[str, nn.Module]:
        """An adapter's modules by path, whether they are in the base model or stored."""
        if self.active == name:
            return {path: base.get_submodule(path) for path in self.paths[name]}
        return {path: self.waiting[_key(name, path)] for path in self.paths[name]}

    def check_mixed(self, names: Iterable[str], active: str | None) -> None:
        """Refuse a batch whose sequences need different modules in the base model.

        Raises:
            ValueError: the batch names other adapters than the active one, and one of these
                adapters trains whole modules.
        """
        named = set(names)
        holders = [name for name in {*named, *([active] if active else [])} if self.paths.get(name)]
        if holders and named != {active}:
            raise ValueError(
                f"adapter_names cannot mix adapters that train whole modules, which {holders[0]!r} "
                f"does ({', '.join(self.paths[holders[0]])}); make one batch for each and call "
                "set_adapter"
            )


def copy_modules(base: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Copy modules for training; return the copies by path.

    Copies keep the base's dtype, because their input has it. A parameter that several of the
    modules share is shared by the copies too.
    """
    copies, copied = {}, dict[int, Any]()
    for path in paths:
        module = base.get_submodule(path)
        with gathered(*module.parameters()):
            copies[path] = copy.deepcopy(module, copied)
    return copies


def check_module_tensors(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Check that stored tensors, named ``<path>.<parameter>``, fit these modules.

    Raises:
        ValueError: a missing or unknown name, a wrong shape or dtype, different values for one
            shared parameter, or a number that is not finite where the model's own is.
    """
    expected, aliases = _unique_tensors(modules)
    missing = sorted(expected.keys() - tensors)
    unknown = sorted(tensors.keys() - expected - aliases.keys())
    if missing or unknown:
        raise ValueError(
            f"stored modules_to_save do not fit the model; missing: {', '.join(missing) or 'none'},"
            f" unknown: {', '.join(unknown) or 'none'}. Load the adapter onto the base that it was "
            "trained on"
        )
    for name, target in expected.items():
        if target.shape != tensors[name].shape:
            raise ValueError(
                f"stored modules_to_save: {name} must have shape {tuple(target.shape)}, "
                f"got {tuple(tensors[name].shape)}; give the base the vocabulary or number of "
                "labels that the adapter was trained with"
            )
        if target.dtype in FLOATS:
            if target.isfinite().all():  # a buffer may be a mask of −inf
                check_numbers(f"stored modules_to_save: {name}", tensors[name], target.dtype)
        elif tensors[name].dtype != target.dtype:
            raise ValueError(
                f"stored modules_to_save: {name} must be of {target.dtype}, "
                f"got {tensors[name].dtype}"
            )
    for name in sorted(aliases.keys() & tensors):
        first, second = tensors[aliases[name]], tensors[name]
        if first.dtype != second.dtype or not torch.equal(first, second):
            raise ValueError(
                f"stored modules_to_save: {aliases[name]} and {name} must be equal, they are one "
                "parameter of this model; untie it before loading this adapter"
            )


@torch.no_grad()
def load_module_tensors(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Set modules to tensors that :func:`check_module_tensors` has accepted."""
    for name, target in module_tensors(modules).items():
        copy_full_tensor(target, tensors[name])


def module_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of modules as ``<path>.<parameter>``; a shared one is named once."""
    return {name: value.detach() for name, value in _unique_tensors(modules)[0].items()}


def _unique_tensors(modules: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers of modules, each under its first name; and further name -> first
    name of those that several modules share."""
    first_names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for path, module in modules.items():
        for key, value in module.state_dict(keep_vars=True).items():
            name = f"{path}.{key}"
            first = first_names.setdefault(id(value), name)
            if first == name:
                tensors[name] = value
            else:
                aliases[name] = first
    return tensors, aliases


def _key(adapter: str | None, path: str) -> str:
    # Keys of a ModuleDict hold no dots; adapter names hold no slashes, so the key is unambiguous.
    return f"{'' if adapter is None else adapter}/{path.replace('.', '/')}"


def _set(base: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(base.get_submodule(parent), name, module)
