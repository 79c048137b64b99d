"""Modules of the base that an adapter trains in full, PEFT's ``modules_to_save``.

The active adapter's copy stands in the base model where the original stood; originals and the
copies of other adapters wait here, frozen. A module is always in exactly one place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reft.adapter.sharding import gathered, write
from reft.adapter.tensor_checks import check_numbers
from reft.config import FLOATS


class ModulesToSave(nn.Module):
    """Heads that are not in the model at the moment.

    Attributes:
        shown: the adapter whose copies are in the model, or None for the originals.
        paths: adapter -> the paths of its heads in the base model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting = nn.ModuleDict()
        self.shown: str | None = None
        self.paths: dict[str, tuple[str, ...]] = {}

    def add(self, name: str, copies: Mapping[str, nn.Module]) -> None:
        """Keep an adapter's heads, by their path in the base model."""
        self.paths[name] = tuple(copies)
        for path, module in copies.items():
            self.waiting[_key(name, path)] = module

    def remove(self, base: nn.Module, name: str) -> None:
        """Forget an adapter's heads; if they are in the model, the originals return."""
        if self.shown == name:
            self.show(base, None)
        for path in self.paths.pop(name):
            del self.waiting[_key(name, path)]

    def show(self, base: nn.Module, name: str | None) -> None:
        """Put an adapter's copies into the model, or the originals for None."""
        if name == self.shown:
            return
        if self.shown is not None:
            self._swap(base, self.shown, taken=self.shown, put=None)
        if name is not None:
            self._swap(base, name, taken=None, put=name)
        self.shown = name

    def _swap(self, base: nn.Module, owner: str, *, taken: str | None, put: str | None) -> None:
        for path in self.paths[owner]:
            present, key = base.get_submodule(path), _key(put, path)
            _set(base, path, self.waiting[key])
            del self.waiting[key]
            self.waiting[_key(taken, path)] = present

    def modules_of(self, base: nn.Module, name: str) -> dict[str, nn.Module]:
        """An adapter's heads by path, wherever they are."""
        if self.shown == name:
            return {path: base.get_submodule(path) for path in self.paths[name]}
        return {path: self.waiting[_key(name, path)] for path in self.paths[name]}

    def check_mixed(self, names: Iterable[str], active: str | None) -> None:
        """Refuse a batch in which sequences would need different heads.

        Raises:
            ValueError: an adapter other than the active one alone, where one of them has heads.
        """
        named = set(names)
        holders = [name for name in {*named, *([active] if active else [])} if self.paths.get(name)]
        if holders and named != {active}:
            raise ValueError(
                f"adapter_names cannot mix adapters that train whole modules, which {holders[0]!r} "
                f"does ({', '.join(self.paths[holders[0]])}); make one batch for each and call "
                "set_adapter"
            )


def copy_heads(base: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Copies of modules to train, by path; in the base's dtype, which their input has. A parameter
    that several of them hold is one in the copies too."""
    copies, copied = {}, dict[int, Any]()
    for path in paths:
        module = base.get_submodule(path)
        with gathered(*module.parameters()):
            copies[path] = copy.deepcopy(module, copied)
    return copies


def check_heads(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Check that ``<path>.<parameter>`` tensors are the state of these heads.

    Raises:
        ValueError: a missing or unknown name, a wrong shape or dtype, two values of one parameter,
            a number that is not finite where the model's own are.
    """
    wanted, further = _held(modules)
    missing = sorted(wanted.keys() - tensors)
    unknown = sorted(tensors.keys() - wanted - further.keys())
    if missing or unknown:
        raise ValueError(
            f"stored heads do not fit the model; missing: {', '.join(missing) or 'none'}, "
            f"unknown: {', '.join(unknown) or 'none'}. Load them onto the base they were trained on"
        )
    for name, target in wanted.items():
        if target.shape != tensors[name].shape:
            raise ValueError(
                f"stored head {name} must have shape {tuple(target.shape)}, "
                f"got {tuple(tensors[name].shape)}; give the base the vocabulary or number of "
                "labels that the head was trained with"
            )
        if target.dtype in FLOATS:
            if target.isfinite().all():  # a buffer may be a mask of −inf
                check_numbers(f"stored head {name}", tensors[name], target.dtype)
        elif tensors[name].dtype != target.dtype:
            raise ValueError(
                f"stored head {name} must be of {target.dtype}, got {tensors[name].dtype}"
            )
    for name in sorted(further.keys() & tensors):
        ours, theirs = tensors[further[name]], tensors[name]
        if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            raise ValueError(
                f"stored heads {further[name]} and {name} must be equal, they are one parameter "
                "of this model; untie it before loading this adapter"
            )


@torch.no_grad()
def load_heads(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Set heads from tensors that :func:`check_heads` has accepted."""
    for name, target in head_state(modules).items():
        write(target, tensors[name])


def head_state(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of heads as ``<path>.<parameter>``; those that several hold once."""
    return {name: value.detach() for name, value in _held(modules)[0].items()}


def _held(modules: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(name -> parameter or buffer, each once; the further names of one -> its name there)."""
    names: dict[int, str] = {}
    held: dict[str, Tensor] = {}
    further: dict[str, str] = {}
    for path, module in modules.items():
        for name, value in module.state_dict(keep_vars=True).items():
            first = names.setdefault(id(value), f"{path}.{name}")
            if first == f"{path}.{name}":
                held[first] = value
            else:
                further[f"{path}.{name}"] = first
    return held, further


def _key(owner: str | None, path: str) -> str:
    # A module name holds no dots; an adapter name holds none either, so the key is unambiguous.
    return f"{'' if owner is None else owner}/{path.replace('.', '/')}"


def _set(base: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(base.get_submodule(parent), name, module)
