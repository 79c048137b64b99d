"""Methods of a :class:`reft.ReftModel` that its base model gets while adapters are attached.

Trainers, and users of ``get_base_model()``, hold the transformers model and not the wrapper. Its
own ``save_pretrained`` would write the whole base, with keys of adapters that nothing can load. So
the base saves and counts as the wrapper does, and refuses a state dict with half of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from reft.adapter.multi_device import check_adapter_states
from reft.model.peft_compat import transformers_model
from reft.model.registry import SUBMODULE

#: Methods of the wrapper that its base gets.
METHODS = (
    "save_pretrained",
    "push_to_hub",
    "get_nb_trainable_parameters",
    "print_trainable_parameters",
)


class Handle(Protocol):
    """An object that undoes a change."""

    def remove(self) -> None: ...


class Wrapper(Protocol):
    """The attributes of :class:`reft.ReftModel` that are used besides :data:`METHODS`."""

    base_model: nn.Module

    @property
    def configs(self) -> Mapping[str, Any]: ...

    @property
    def save_pretrained(self) -> Any: ...


def put_on_base(wrapper: Wrapper) -> list[Handle]:
    """Put :data:`METHODS` on the base of a wrapper, and ``save_pretrained`` on PEFT's wrapper.

    The new attributes are partial objects, not closures, so that a copied or pickled base has the
    adapters of its copy.

    Returns:
        Handles that undo each change.
    """
    base = wrapper.base_model
    inner = transformers_model(base)
    handles: list[Handle] = [inner.register_load_state_dict_pre_hook(check_adapter_states)]
    for name in METHODS:
        handles.append(_Attribute(inner, name, partial(getattr(type(wrapper), name), wrapper)))
    if base is not inner:
        handles.append(_Attribute(base, "save_pretrained", partial(_save_beside_peft, wrapper)))
    return handles


def _save_beside_peft(wrapper: Wrapper, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """``save_pretrained`` of PEFT's wrapper: write PEFT's files, and every adapter of this library
    into the subfolder ``reft``."""
    peft: Any = type(wrapper.base_model)
    peft.save_pretrained(wrapper.base_model, save_directory, *args, **kwargs)
    names = list(wrapper.configs)
    shared = {name: kwargs[name] for name in ("state_dict", "is_main_process") if name in kwargs}
    if names:
        wrapper.save_pretrained(Path(save_directory) / SUBMODULE, selected_adapters=names, **shared)


class _Attribute:
    """An attribute of a module that hides an earlier one until it is removed."""

    def __init__(self, module: nn.Module, name: str, value: Any) -> None:
        self.module, self.name = module, name
        self.before = {name: vars(module)[name]} if name in vars(module) else {}
        setattr(module, name, value)

    def remove(self) -> None:
        """Remove the attribute and restore the earlier one."""
        delattr(self.module, self.name)
        for name, value in self.before.items():
            setattr(self.module, name, value)
