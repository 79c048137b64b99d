"""Keywords of PEFT and transformers for saving and loading.

Keywords with a meaning here are used, keywords without effect are ignored, and unsupported ones are
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from reft.safe_read import shown


class Loading(TypedDict, total=False):
    """Keywords of ``from_pretrained`` and ``load_adapter``, as type checkers see them."""

    subfolder: str | None
    revision: str | None
    token: str | bool | None
    cache_dir: Any
    force_download: bool
    local_files_only: bool
    autocast_adapter_dtype: bool
    ephemeral_gpu_offload: bool
    low_cpu_mem_usage: bool
    torch_device: Any


class Saving(TypedDict, total=False):
    """Keywords of ``save_pretrained``, as type checkers see them."""

    selected_adapters: Sequence[str] | None
    is_main_process: bool
    safe_serialization: bool | None
    push_to_hub: bool | None
    save_embedding_layers: str | bool | None
    variant: str | None
    max_shard_size: int | str
    save_function: Callable[..., Any]
    save_original_format: bool
    save_peft_format: bool


#: Keywords of loading that say where an adapter is: on the hub, or in which subfolder.
PLACE = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")

#: Keywords of loading without effect: an adapter is small, is put on the device of its blocks, and
#: has the dtype of its configuration.
_IGNORED_IN_LOADING = (
    "autocast_adapter_dtype",
    "ephemeral_gpu_offload",
    "low_cpu_mem_usage",
    "torch_device",
)

#: Keywords of saving that are used.
_USED_IN_SAVING = ("selected_adapters", "is_main_process")

#: Keywords of saving without effect: there is one file, and its format is always safetensors.
_IGNORED_IN_SAVING = ("max_shard_size", "save_function", "save_original_format", "save_peft_format")

#: Keyword of saving -> the values that change nothing, and what to do instead of another value.
_UNSUPPORTED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "safe_serialization": (
        (True, None),
        "no pickle is written; every reader takes a safetensors file",
    ),
    "push_to_hub": ((False, None), "call ReftModel.push_to_hub(repo_id) instead"),
    "save_embedding_layers": (
        ("auto", False, None),
        "an adapter stores the modules that it trains: name them in ReftConfig.modules_to_save",
    ),
    "variant": ((None,), "an adapter has one file of weights"),
}


def place_of(method: str, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of loading that say where an adapter is.

    Args:
        method: the method that got the keywords, for the message.
        keywords: all keywords it got.

    Raises:
        TypeError: a keyword is unknown.
    """
    _refuse_unknown(method, keywords, (*PLACE, *_IGNORED_IN_LOADING))
    return {name: value for name, value in keywords.items() if name in PLACE}


def check_saving(method: str, keywords: Mapping[str, Any]) -> None:
    """Refuse keywords of saving that are unknown or have an unsupported value.

    Raises:
        TypeError: a keyword is unknown.
        ValueError: a keyword has an unsupported value.
    """
    _refuse_unknown(method, keywords, (*_USED_IN_SAVING, *_IGNORED_IN_SAVING, *_UNSUPPORTED))
    for name, (allowed, instead) in _UNSUPPORTED.items():
        if name in keywords and not any(keywords[name] == value for value in allowed):
            listed = " or ".join(map(repr, allowed))
            raise ValueError(
                f"{name} of {method} must be {listed}, got {shown(keywords[name])}: {instead}"
            )


def names_to_save(selected: Sequence[str] | None, adapter_name: str | None) -> list[str | None]:
    """The adapters to save, None for the active one.

    Raises:
        TypeError: ``selected_adapters`` is a string instead of a list.
        ValueError: both arguments are given, or the list is empty.
    """
    if selected is None:
        return [adapter_name]
    if isinstance(selected, str):
        raise TypeError(f"selected_adapters must be a list of names, got {shown(selected)}")
    if adapter_name is not None or not selected:
        raise ValueError(
            "selected_adapters must be a non-empty list of names without adapter_name, got "
            f"{shown(list(selected))} and adapter_name={shown(adapter_name)}"
        )
    return list(selected)


def _refuse_unknown(method: str, keywords: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in keywords:
        if name not in known:
            raise TypeError(
                f"ReftModel.{method}() got an unexpected keyword argument {name!r}; besides those "
                f"in its signature it takes {', '.join(sorted(known))}"
            )
