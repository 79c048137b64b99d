"""What a transformers model does by itself while adapters are on it: it saves and counts them, and
refuses a state dict that would load half of one.

Trainers, and whoever calls ``get_base_model()``, hold this model and not the wrapper. Its own
``save_pretrained`` would write the base, with keys of adapters in it that nothing can load.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from reft.adapter.multi_device import check_adapter_states
from reft.model.registry import SUBMODULE

if TYPE_CHECKING:
    from reft.model.reft_model import ReftModel

#: Methods of the wrapper that stand on the transformers model too.
METHODS = (
    "save_pretrained",
    "push_to_hub",
    "get_nb_trainable_parameters",
    "print_trainable_parameters",
)


class Handle(Protocol):
    """What undoes something."""

    def remove(self) -> None: ...


def put_on_base(model: ReftModel) -> list[Handle]:
    """Let the base of a wrapper, and PEFT's wrapper around it, save what is trained.

    What is put there are partial objects, not closures, so that a copy or a pickle of the base has
    the adapters of the copy.

    Returns:
        What takes it off again.
    """
    base, inner = model.base_model, model.get_base_model()
    made: list[Handle] = [inner.register_load_state_dict_pre_hook(check_adapter_states)]
    kind = type(model)
    made += [_Attribute(inner, name, partial(getattr(kind, name), model)) for name in METHODS]
    if base is not inner:
        made.append(_Attribute(base, "save_pretrained", partial(_save_beside_peft, model)))
    return made


def _save_beside_peft(model: ReftModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """``save_pretrained`` of PEFT's wrapper: what PEFT writes, and every adapter of the edits in
    the folder ``reft`` in it."""
    peft: Any = type(model.base_model)
    peft.save_pretrained(model.base_model, save_directory, *args, **kwargs)
    names = list(model.configs)
    shared = {one: kwargs[one] for one in ("state_dict", "is_main_process") if one in kwargs}
    if names:
        model.save_pretrained(Path(save_directory) / SUBMODULE, selected_adapters=names, **shared)


class _Attribute:
    """An attribute of a module, there until it is removed; what there was comes back then."""

    def __init__(self, module: nn.Module, name: str, value: Any) -> None:
        self.module, self.name = module, name
        self.before = {name: vars(module)[name]} if name in vars(module) else {}
        setattr(module, name, value)

    def remove(self) -> None:
        """Take it off."""
        delattr(self.module, self.name)
        for name, value in self.before.items():
            setattr(self.module, name, value)
