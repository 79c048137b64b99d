"""A base model into which PEFT has put layers of its own, LoRA's for one.

Either PEFT's wrapper is around it (``peft.get_peft_model``), or the layers are in the transformers
model itself (its ``add_adapter``). Adapters of this library go to the transformers model, so that
they fit it with and without the wrapper; what PEFT trains goes on being trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from reft.model.reft_model import ReftModel


def is_wrapper(base: nn.Module) -> bool:
    """Whether this is PEFT's wrapper around a transformers model."""
    return hasattr(base, "peft_config") and hasattr(base, "get_base_model")


def transformers_model(base: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper; without one, the model that was given.

    Raises:
        ValueError: PEFT puts virtual tokens in front of the prompt.
    """
    if not is_wrapper(base):
        return base
    configs: Any = base.peft_config
    for name, config in configs.items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                "base_model must have no virtual tokens in front of its prompt, in which positions "
                f"are counted; PEFT's adapter {name!r} is {config.peft_type}"
            )
    inner: nn.Module = base.get_base_model()  # type: ignore[operator]
    return inner


def has_layers(base: nn.Module) -> bool:
    """Whether PEFT's layers are in the model."""
    if not getattr(base, "peft_config", None):  # some releases leave it behind after a merge
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in base.modules())


def trained_modules(base: nn.Module) -> list[str]:
    """Paths of the modules that PEFT trains in full, its ``modules_to_save``."""
    return [
        path
        for path, module in base.named_modules()
        if "original_module" in module._modules and "modules_to_save" in module._modules
    ]


def freeze(model: nn.Module) -> frozenset[str]:
    """Freeze a transformers model, unless PEFT has frozen what it does not train.

    Returns:
        Names of the parameters that were not frozen before.
    """
    if has_layers(model):
        return frozenset()
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    for parameter in trained.values():
        parameter.requires_grad_(False)
    return frozenset(trained)


# -------------------------------------------------------------------- ways of a call


def outer(base: nn.Module) -> list[nn.Module]:
    """The modules that users and ``generate`` call: PEFT's wrapper if there is one, the model."""
    return [base, transformers_model(base)] if is_wrapper(base) else [base]


def callers(base: nn.Module, stack: nn.Module) -> list[nn.Module]:
    """The modules whose call, with the arguments of ``stack``, runs the forward of ``stack``.

    PEFT's tuner, in the wrapper, calls the model's ``forward`` past the model's hooks, until 0.19.
    """
    if is_wrapper(base) and stack is transformers_model(base):
        tuner = base.base_model
        assert isinstance(tuner, nn.Module)
        return [tuner, stack]
    return [stack]


def register(
    modules: Sequence[nn.Module], before: Callable[[nn.Module], Any], after: Any
) -> list[RemovableHandle]:
    """Put a forward pre-hook that takes keywords, ``before(module)``, and a forward hook that is
    run even if the forward fails on each module."""
    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(before(module), with_kwargs=True))
        handles.append(module.register_forward_hook(after, always_call=True))
    return handles


# -------------------------------------------------------------------- the other order


#: Attributes of PEFT's models, and of transformers' with PEFT's layers -> what stands here instead.
_INSTEAD = {
    "peft_config": "the configurations of its adapters are ReftModel.configs",
    "active_peft_config": "the configuration is ReftModel.configs[ReftModel.active_adapter]",
    "peft_type": "the kind of an adapter is ReftModel.configs[name].intervention",
    "disable_adapters": "write: with model.disable_adapter()",
    "enable_adapters": "adapters are enabled outside of: with model.disable_adapter()",
    "disable_adapter_layers": "write: with model.disable_adapter()",
    "enable_adapter_layers": "adapters are enabled outside of: with model.disable_adapter()",
    "get_adapter_state_dict": "save_pretrained writes an adapter",
    "unmerge_adapter": "an adapter of this library is never merged",
    "add_weighted_adapter": "adapters of this library are not mixed; one edits each sequence",
}


def attribute(base: nn.Module, name: str) -> Any:
    """An attribute of the base. Those of PEFT are there only if PEFT's layers are.

    Raises:
        AttributeError: it has none of that name.
    """
    if name in _INSTEAD and not has_layers(base):
        raise AttributeError(
            f"a ReftModel has no {name!r} while PEFT has no layers in its base; {_INSTEAD[name]}"
        )
    return getattr(base, name)


class Config:
    """``ReftModel.peft_config``: that of the base. PEFT sets it at the end of wrapping a model."""

    def __get__(self, model: ReftModel | None, owner: object = None) -> Any:
        return self if model is None else attribute(model.base_model, "peft_config")

    def __set__(self, model: ReftModel, value: object) -> None:
        raise ValueError(
            "PEFT comes first: reft.get_reft_model(peft.get_peft_model(base, …), …). PEFT has put "
            "its layers into the base of this ReftModel and frozen all else, so load the base anew"
        )
