"""Saving and loading the adapters of a model; the files themselves are ``checkpoint``'s."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from reft.adapter.sharding import whole
from reft.adapter.tensor_checks import HEADS, bank_shape, check_layout
from reft.config import FLOATS, ReftConfig
from reft.io.adapter_files import read_adapter, write_adapter
from reft.model.adapters import attach, build
from reft.model.arguments import check_base
from reft.model.ends import end_header, read_ends
from reft.model.hub import local_folder
from reft.model.keywords import check_saving, names_of, place_of
from reft.model.labels import label_header, read_labels, take_labels
from reft.model.lora import save_lora, warn_of_absent_lora
from reft.model.model_card import write_card
from reft.model.modules_to_save import check_heads, head_state, load_heads
from reft.model.origins import origin_of, warn_of_another_base

if TYPE_CHECKING:
    from reft.model.reft_model import ReftModel

#: The adapter that PEFT's habit stores in the folder itself, and others in folders of their names.
DEFAULT = "default"

_Path = str | os.PathLike[str]


def save(
    model: ReftModel,
    path: _Path,
    adapter_name: str | None,
    training_state: bool,
    state_dict: Mapping[str, Tensor] | None,
    *,
    selected_adapters: Sequence[str] | None = None,
    is_main_process: bool = True,
    **others: Any,
) -> None:
    """See :meth:`ReftModel.save_pretrained`."""
    check_saving("save_pretrained", others)
    names = [_name(model, one) for one in names_of(selected_adapters, adapter_name)]
    for name in names:
        model._registry.adapter(name)
    if state_dict is not None and not is_main_process:
        return  # what was gathered, one process may have alone
    # All of them before the first is written; and of parts that ranks hold, every rank has to ask.
    found = {name: _tensors(model, name, training_state, state_dict) for name in names}
    labels = label_header(model.get_base_model())
    for name, tensors in found.items() if is_main_process else ():
        beside = selected_adapters is not None and name != DEFAULT
        folder = Path(path) / name if beside else Path(path)
        more = {**labels, **end_header(model._registry.ends.get(name, ()))}
        write_adapter(folder, model.configs[name], tensors, more)
        if not training_state:
            write_card(folder, model, name, source=".")
    save_lora(model, path, state_dict, writes=is_main_process)


def _tensors(
    model: ReftModel, name: str, training_state: bool, state_dict: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """What is stored of an adapter: of its edit, and of its heads."""
    registry = model._registry
    adapter = registry.adapter(name)
    heads = registry.heads.modules_of(model.get_base_model(), name)
    own = stored_heads = None
    if state_dict is not None:
        names = {id(module): path for path, module in model.base_model.named_modules()}
        inner = {id(module): path for path, module in model.get_base_model().named_modules()}
        own = _part(state_dict, names[id(adapter)], inner[id(adapter)])
        found = {
            f"{path}.{key}": value
            for path, module in heads.items()
            for key, value in _part(state_dict, names[id(module)], inner[id(module)]).items()
        }
        stored_heads = {key: found[key] for key in head_state(heads)}
    tensors = adapter.training_state(own) if training_state else adapter.export_state_dict(own)
    return tensors | {
        HEADS + key: whole(value) for key, value in (stored_heads or head_state(heads)).items()
    }


def load_model(
    cls: type[ReftModel],
    base_model: nn.Module,
    path: _Path,
    adapter_name: str,
    is_trainable: bool,
    **keywords: Any,
) -> ReftModel:
    """See :meth:`ReftModel.from_pretrained`."""
    check_base(base_model)
    path = local_folder(path, **place_of("from_pretrained", keywords))
    config, _ = read_adapter(path)
    model = cls(base_model, config.block_path)
    try:
        load_adapter(model, path, adapter_name, is_trainable)
    except BaseException:
        model.unload()
        raise
    return model if is_trainable else model.eval()


def load_adapter(
    model: ReftModel, path: _Path, adapter_name: str, is_trainable: bool, **keywords: Any
) -> None:
    """See :meth:`ReftModel.load_adapter`."""
    path = local_folder(path, **place_of("load_adapter", keywords))
    config, tensors = read_adapter(path)
    labels, ends = read_labels(path), read_ends(path)
    edit, heads = _split(tensors)
    put(model, path, adapter_name, config, edit, heads)
    if ends:
        model._registry.ends[adapter_name] = ends
    take_labels(model, labels, path)
    warn_of_another_base(path, config, origin_of(model.get_base_model()))
    warn_of_absent_lora(path, model.get_base_model())
    if model.active_adapter is None:
        model.set_adapter(adapter_name, inference_mode=not is_trainable)


def put(
    model: ReftModel,
    path: _Path,
    name: str,
    config: ReftConfig,
    tensors: Mapping[str, Tensor],
    head_tensors: Mapping[str, Tensor],
) -> None:
    """Attach an adapter with these values, frozen and not active.

    Args:
        model: that gets it.
        path: where it comes from, for messages.
        name, config: its own.
        tensors: of its edit, as :meth:`reft.adapter.parameters.AdapterParameters.load` takes them.
        head_tensors: of its heads.

    Raises:
        ValueError: what does not fit. Nothing was changed.
    """
    registry, base = model._registry, model.get_base_model()
    try:
        # Before room is made for what the configuration says.
        layers = config.resolve_layers(len(registry.sites.blocks))
        check_layout(config, bank_shape(config, len(layers), registry.sites.dim), tensors)
        # Whatever the configuration starts from, it is overwritten.
        adapter, heads = build(registry, base, name, replace(config, init="pyreft"))
        adapter.config = replace(adapter.config, init=config.init)
        if adapter.is_meta:
            raise ValueError("base_model must be on a real device, got meta tensors")
        check_heads(heads, head_tensors)
        adapter.load(tensors)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
    load_heads(heads, head_tensors)
    attach(registry, base, name, adapter, heads)


def restore(model: ReftModel, path: _Path, adapter_name: str | None) -> None:
    """See :meth:`ReftModel.restore`."""
    registry = model._registry
    name = _name(model, adapter_name)
    adapter = registry.adapter(name)
    config, tensors = read_adapter(path)
    _check_same(path, config, adapter.config)
    edit, head_tensors = _split(tensors)
    heads = registry.heads.modules_of(model.get_base_model(), name)
    try:
        check_heads(heads, head_tensors)
        adapter.load(edit, training_state=True)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}{_why(tensors)}") from None
    load_heads(heads, head_tensors)
    warn_of_another_base(path, config, origin_of(model.get_base_model()))


def _name(model: ReftModel, adapter_name: str | None) -> str:
    name = model.active_adapter if adapter_name is None else adapter_name
    if name is None:
        raise ValueError("adapter_name must be given, no adapter is active")
    return name


def _part(state: Mapping[str, Tensor], module: str, inner: str) -> dict[str, Tensor]:
    """The entries of one module, in the state of the base, of the wrapper, or of the transformers
    model in PEFT's wrapper, in which its path is ``inner``."""
    for prefix in (f"{module}.", f"base_model.{module}.", f"{inner}."):
        part = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
        if part:
            return part
    raise ValueError(f"state_dict must hold the parameters of {module}, it has none")


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The edit's tensors, and those of heads without their prefix."""
    heads = {
        key.removeprefix(HEADS): value for key, value in tensors.items() if key.startswith(HEADS)
    }
    return {key: value for key, value in tensors.items() if not key.startswith(HEADS)}, heads


def _why(tensors: Mapping[str, Tensor]) -> str:
    if all(one.isfinite().all() for one in tensors.values() if one.dtype in FLOATS):
        return ""
    return "; the run had diverged when this was saved, go on from an earlier checkpoint"


def _check_same(path: _Path, stored: ReftConfig, present: ReftConfig) -> None:
    ours, theirs = present.to_dict(), stored.to_dict()
    differing = [
        f"{name} = {theirs[name]!r} (here {ours[name]!r})"
        for name in ours
        if name != "base_model_name_or_path" and ours[name] != theirs[name]
    ]
    if differing:
        raise ValueError(
            f"{os.fspath(path)} must hold an adapter of the same configuration; it has "
            f"{', '.join(differing)}"
        )
