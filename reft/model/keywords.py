"""Keywords with which users of PEFT and transformers save and load: those that mean something here
are taken, those that change nothing are passed over, and the others are refused."""

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


#: What says where on the hub, or in which folder of it, an adapter is.
PLACE = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")

#: Of loading, without effect: an adapter is small, is put where its blocks are, and has the dtype
#: that its configuration says.
_IDLE_IN_LOADING = (
    "autocast_adapter_dtype",
    "ephemeral_gpu_offload",
    "low_cpu_mem_usage",
    "torch_device",
)

#: Of saving, without effect: the file is one, and it is always of safetensors.
_IDLE_IN_SAVING = ("max_shard_size", "save_function", "save_original_format", "save_peft_format")

#: Of saving: keyword -> the values that change nothing, and what to do instead of another.
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "safe_serialization": (
        (True, None),
        "no pickle is written, a file of safetensors is what every reader takes",
    ),
    "push_to_hub": ((False, None), "call ReftModel.push_to_hub(repo_id) instead"),
    "save_embedding_layers": (
        ("auto", False, None),
        "an adapter stores the modules that it trains: name them in ReftConfig.modules_to_save",
    ),
    "variant": ((None,), "an adapter has one file of weights"),
}


def place_of(method: str, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """What keywords of loading say of the place of an adapter.

    Args:
        method: whose keywords they are, for the message.
        keywords: as they were given.

    Raises:
        TypeError: a keyword that is not known.
    """
    _refuse_unknown(method, keywords, (*PLACE, *_IDLE_IN_LOADING))
    return {name: value for name, value in keywords.items() if name in PLACE}


def check_saving(method: str, keywords: Mapping[str, Any]) -> None:
    """Refuse keywords of saving that would not be obeyed.

    Raises:
        TypeError: one that is not known.
        ValueError: one that is, with a value that has no meaning here.
    """
    _refuse_unknown(method, keywords, (*_IDLE_IN_SAVING, *_REFUSED))
    for name, (allowed, instead) in _REFUSED.items():
        if name in keywords and not any(keywords[name] == one for one in allowed):
            listed = " or ".join(map(repr, allowed))
            raise ValueError(
                f"{name} of {method} must be {listed}, got {shown(keywords[name])}: {instead}"
            )


def names_of(selected: Sequence[str] | None, adapter_name: str | None) -> list[str | None]:
    """The adapters that are to be saved, None for the active one.

    Raises:
        TypeError: a string in the place of a list.
        ValueError: both are given, or an empty list.
    """
    if selected is None:
        return [adapter_name]
    if isinstance(selected, str):
        raise TypeError(f"selected_adapters must be a list of names, got {shown(selected)}")
    if adapter_name is not None or not selected:
        raise ValueError(
            "selected_adapters must be a list of names and stand alone, got "
            f"{shown(list(selected))} and adapter_name={shown(adapter_name)}"
        )
    return list(selected)


def _refuse_unknown(method: str, keywords: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in keywords:
        if name not in known:
            raise TypeError(
                f"ReftModel.{method}() got an unexpected keyword argument {name!r}; beside those "
                f"in its signature it takes {', '.join(sorted(known))}"
            )
