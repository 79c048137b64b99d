"""Checks of the arguments that wrap a model or add an adapter, made before anything is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import nn

from reft.config import ReftConfig

_ORDER = "get_reft_model(base_model, ReftConfig(…))"


def check_base(base_model: object, block_path: object = None) -> None:
    """Refuse a base that is not a loaded model.

    Raises:
        TypeError: ``base_model`` is not a module but, say, a configuration, a name or a class; or
            ``block_path`` is not a string.
    """
    if not isinstance(base_model, nn.Module):
        wanted = "base_model must be a torch.nn.Module"
        if isinstance(base_model, type):
            instead = f"; give a loaded model, as {base_model.__name__}.from_pretrained(…)"
            raise TypeError(f"{wanted}, got the class {base_model.__name__}{instead}")
        instead = ""
        if isinstance(base_model, (str, os.PathLike)):
            instead = "; load it first, as AutoModelForCausalLM.from_pretrained(…), it comes first"
        elif isinstance(base_model, ReftConfig) or hasattr(base_model, "peft_type"):
            instead = f"; the model comes first: {_ORDER}"
        raise TypeError(f"{wanted}, got {type(base_model).__name__}{instead}")
    if not (block_path is None or isinstance(block_path, str)):
        raise TypeError(
            f"block_path must be None or a string, got {type(block_path).__name__}; {_ORDER} makes "
            "a model with a new adapter"
        )


def check_config(config: object, adapter_name: object = None) -> None:
    """Refuse a configuration that is not a :class:`reft.ReftConfig`.

    Args:
        config: the argument to check.
        adapter_name: the argument next to it, which may have been swapped with it.

    Raises:
        TypeError: ``config`` is another library's configuration, a mapping, a class or a name; or
            ``adapter_name`` is the configuration.
    """
    if isinstance(adapter_name, ReftConfig):
        raise TypeError(
            "adapter_name must be a string, got a ReftConfig; the name comes first in "
            "add_adapter(adapter_name, config), and get_reft_model takes one configuration"
        )
    if isinstance(config, ReftConfig):
        return
    kind = config if isinstance(config, type) else type(config)
    origin = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    if isinstance(config, nn.Module):
        instead = f"; the model comes first: {_ORDER}"
    elif isinstance(config, type) and issubclass(config, ReftConfig):
        instead = "; make one: ReftConfig(rank=4)"
    elif hasattr(config, "peft_type"):
        instead = (
            "; what PEFT trains goes into the base first: get_reft_model(peft.get_peft_model(…), "
            "ReftConfig(…))"
        )
    elif kind.__name__.lower().startswith("reft") or "reft" in kind.__module__.lower():
        instead = "; write its fields anew, as reft.ReftConfig(layers=[15], rank=4)"
    elif isinstance(config, Mapping):
        instead = "; ReftConfig.from_dict makes one of a mapping"
    elif isinstance(config, (str, os.PathLike)):
        instead = "; ReftModel.from_pretrained(base_model, path) loads a stored adapter"
    else:
        instead = ""
    given = f"the class {origin}" if isinstance(config, type) else origin
    raise TypeError(f"config must be a reft.ReftConfig, got {given}{instead}")


def check_mode(inference_mode: object) -> None:
    """Refuse an ``inference_mode`` that is not a bool, such as a second adapter's name.

    Raises:
        TypeError: it is not a bool.
    """
    if not isinstance(inference_mode, bool):
        raise TypeError(
            f"inference_mode must be True or False, got {inference_mode!r}; one adapter is active"
        )
