"""Base models that contain layers of PEFT, such as LoRA.

Either the base is in PEFT's wrapper (``peft.get_peft_model``), or the layers are in the
transformers model itself (its ``add_adapter``). Adapters of this library are attached to the
transformers model, so that they fit it with and without the wrapper. PEFT's trainable parameters
stay trainable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


def is_wrapper(base: nn.Module) -> bool:
    """Whether this is PEFT's wrapper around a transformers model."""
    return hasattr(base, "peft_config") and hasattr(base, "get_base_model")


def transformers_model(base: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper; without a wrapper, the model itself.

    Raises:
        ValueError: an adapter of PEFT puts virtual tokens in front of the prompt.
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
    """Whether the model contains layers of PEFT."""
    if not getattr(base, "peft_config", None):  # some releases keep it after a merge
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in base.modules())


def trained_modules(base: nn.Module) -> list[str]:
    """Paths of the modules that PEFT trains in full, PEFT's own ``modules_to_save``."""
    return [
        path
        for path, module in base.named_modules()
        if "original_module" in module._modules and "modules_to_save" in module._modules
    ]


def freeze(model: nn.Module) -> frozenset[str]:
    """Freeze a transformers model. With layers of PEFT in it nothing changes: PEFT has frozen it.

    Returns:
        Names of the parameters that were trainable before.
    """
    if has_layers(model):
        return frozenset()
    trainable = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    for parameter in trainable.values():
        parameter.requires_grad_(False)
    return frozenset(trainable)


# -------------------------------------------------------------------- hooks on wrapped models


def outer(base: nn.Module) -> list[nn.Module]:
    """The modules that users and ``generate`` call: the model, and PEFT's wrapper if it has one."""
    return [base, transformers_model(base)] if is_wrapper(base) else [base]


def callers(base: nn.Module, stack: nn.Module) -> list[nn.Module]:
    """The modules that run the forward of ``stack`` when called with its arguments.

    Up to PEFT 0.19, the tuner in PEFT's wrapper calls the model's ``forward`` directly, so that
    hooks on the model do not run.
    """
    if is_wrapper(base) and stack is transformers_model(base):
        tuner = base.base_model
        assert isinstance(tuner, nn.Module)
        return [tuner, stack]
    return [stack]


def register(
    modules: Sequence[nn.Module], before: Callable[[nn.Module], Any], after: Any
) -> list[RemovableHandle]:
    """Register two hooks on each module: ``before(module)``, a forward pre-hook with keywords, and
    ``after``, a forward hook that runs even if the forward fails."""
    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(before(module), with_kwargs=True))
        handles.append(module.register_forward_hook(after, always_call=True))
    return handles


# -------------------------------------------------------------------- PEFT's attributes


#: Attributes of models with layers of PEFT -> what a ReftModel has instead.
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
    """An attribute of the base; attributes of PEFT only if the base contains layers of PEFT.

    Raises:
        AttributeError: the base has no attribute of that name.
    """
    if name in _INSTEAD and not has_layers(base):
        raise AttributeError(
            f"a ReftModel has no {name!r} while PEFT has no layers in its base; {_INSTEAD[name]}"
        )
    return getattr(base, name)


class Config:
    """Descriptor of ``ReftModel.peft_config``: the base's. PEFT sets it after wrapping a model."""

    def __get__(self, model: Any, owner: object = None) -> Any:
        return self if model is None else attribute(model.base_model, "peft_config")

    def __set__(self, model: object, value: object) -> None:
        raise ValueError(
            "PEFT comes first: reft.get_reft_model(peft.get_peft_model(base, …), …). PEFT has put "
            "its layers into the base of this ReftModel and frozen all else, so load the base anew"
        )
