"""Saving and loading the adapters of a model. :mod:`reft.io.adapter_files` reads and writes the
files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from reft.adapter.sharding import full_tensor
from reft.adapter.tensor_checks import MODULES_PREFIX, check_layout, stack_shape
from reft.config import FLOATS, ReftConfig
from reft.io.adapter_files import read_adapter, write_adapter
from reft.model.adapters import attach, build
from reft.model.end_tokens import end_header, read_ends
from reft.model.labels import adopt_labels, label_header, read_labels
from reft.model.lora import save_lora, warn_of_absent_lora
from reft.model.model_card import write_card
from reft.model.modules_to_save import check_module_tensors, load_module_tensors, module_tensors
from reft.model.origins import origin_of, warn_of_another_base
from reft.model.peft_compat import transformers_model
from reft.model.registry import AdapterRegistry

#: The adapter that PEFT stores in the folder itself, and others in subfolders of their names.
_DEFAULT = "default"

_Path = str | os.PathLike[str]


def name_or_active(registry: AdapterRegistry, adapter_name: str | None) -> str:
    """The given name, or for None that of the active adapter.

    Raises:
        ValueError: no name is given and no adapter is active.
    """
    name = registry.active if adapter_name is None else adapter_name
    if name is None:
        raise ValueError("adapter_name must be given, no adapter is active")
    return name


# -------------------------------------------------------------------- saving


def save_adapters(
    registry: AdapterRegistry,
    base_model: nn.Module,
    directory: _Path,
    names: Sequence[str],
    *,
    subfolders: bool = False,
    training_state: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    is_main_process: bool = True,
) -> None:
    """Write adapters, with a model card unless ``training_state`` is set; and PEFT's adapters.

    Args:
        registry: the adapters of the model.
        base_model: the base model, in PEFT's wrapper if it has one.
        directory: the folder to write into, made if missing.
        names: of the adapters.
        subfolders: write each adapter but "default" into a subfolder of its name, PEFT's layout.
        training_state: also write what :func:`restore_adapter` needs to resume bit for bit.
        state_dict: the full state dict of the model; None to read the parameters.
        is_main_process: whether this process writes.

    Raises:
        OSError, RuntimeError, ValueError: an adapter is unknown or cannot be saved, ``state_dict``
            lacks some of its tensors, or a file cannot be written.
    """
    base = transformers_model(base_model)
    for name in names:
        registry.adapter(name)
    if state_dict is not None and not is_main_process:
        return  # a gathered state dict may exist on the main process alone
    # All tensors are collected before the first file is written, so that a mistake writes nothing.
    # If ranks hold shards, every rank takes part in collecting them.
    tensors = {
        name: _collect_tensors(registry, base_model, name, training_state, state_dict)
        for name in names
    }
    labels = label_header(base)
    for name in names if is_main_process else ():
        folder = Path(directory) / name if subfolders and name != _DEFAULT else Path(directory)
        header = {**labels, **end_header(registry.ends.get(name, ()))}
        write_adapter(folder, registry.adapter(name).config, tensors[name], header)
        if not training_state:
            write_card(folder, registry, base, name, source=".")
    save_lora(base_model, directory, state_dict, writes=is_main_process)


def _collect_tensors(
    registry: AdapterRegistry,
    base_model: nn.Module,
    name: str,
    training_state: bool,
    state_dict: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """The tensors of an adapter's file: those of its edit and of its ``modules_to_save``."""
    base = transformers_model(base_model)
    adapter = registry.adapter(name)
    modules = registry.modules_to_save.modules_of(base, name)
    if state_dict is None:
        edit_state, saved = None, module_tensors(modules)
    else:
        outer = {id(module): path for path, module in base_model.named_modules()}
        inner = {id(module): path for path, module in base.named_modules()}

        def entries(module: nn.Module) -> dict[str, Tensor]:
            return _entries(state_dict, outer[id(module)], inner[id(module)])

        edit_state = entries(adapter)
        gathered = {
            f"{path}.{key}": value
            for path, module in modules.items()
            for key, value in entries(module).items()
        }
        saved = {key: gathered[key] for key in module_tensors(modules)}
    collect = adapter.training_state if training_state else adapter.export_state_dict
    return collect(edit_state) | {
        MODULES_PREFIX + key: full_tensor(value) for key, value in saved.items()
    }


def _entries(state: Mapping[str, Tensor], module: str, inner: str) -> dict[str, Tensor]:
    """The entries of one module in a state dict.

    Args:
        state: of the base, of the :class:`reft.ReftModel`, or of the transformers model in PEFT's
            wrapper.
        module: path of the module in the base.
        inner: path of the module in the transformers model.
    """
    for prefix in (f"{module}.", f"base_model.{module}.", f"{inner}."):
        entries = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
        if entries:
            return entries
    raise ValueError(f"state_dict must hold the parameters of {module}, it has none")


# -------------------------------------------------------------------- loading


def load_adapter(
    registry: AdapterRegistry, base: nn.Module, folder: _Path, adapter_name: str
) -> None:
    """Attach a saved adapter, frozen and not active.

    Args:
        registry: the adapters of the model.
        base: the transformers model.
        folder: the adapter's folder.
        adapter_name: the name that it gets.

    Raises:
        OSError, ValueError: it cannot be read, or does not fit the model. Nothing was changed.
    """
    config, tensors = read_adapter(folder)
    labels, ends = read_labels(folder), read_ends(folder)
    edit, modules = _split(tensors)
    attach_tensors(registry, base, folder, adapter_name, config, edit, modules)
    if ends:
        registry.ends[adapter_name] = ends
    replaced = adopt_labels(base, labels, folder)
    if replaced is not None:
        registry.unnamed_labels = replaced
    warn_of_another_base(folder, config, origin_of(base))
    warn_of_absent_lora(folder, base)


def attach_tensors(
    registry: AdapterRegistry,
    base: nn.Module,
    path: _Path,
    name: str,
    config: ReftConfig,
    edit: Mapping[str, Tensor],
    modules: Mapping[str, Tensor],
) -> None:
    """Attach an adapter with given tensors, frozen and not active.

    Args:
        registry: the adapters of the model.
        base: the transformers model.
        path: where the adapter comes from, for messages.
        name: name of the adapter.
        config: configuration of the adapter.
        edit: tensors of the edit, see :meth:`reft.adapter.parameters.AdapterParameters.load`.
        modules: tensors of its ``modules_to_save``, named ``<path>.<parameter>``.

    Raises:
        ValueError: the adapter does not fit the model. Nothing was changed.
    """
    try:
        # Check before memory is allocated for sizes that a file claims.
        blocks = registry.blocks
        layers = config.resolve_layers(len(blocks.layers))
        check_layout(config, stack_shape(config, len(layers), blocks.dim), edit)
        # All values are overwritten, so any initialisation will do.
        adapter, copies = build(registry, base, name, replace(config, init="pyreft"))
        adapter.config = replace(adapter.config, init=config.init)
        if adapter.is_meta:
            raise ValueError("base_model must be on a real device, got meta tensors")
        check_module_tensors(copies, modules)
        adapter.load(edit)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
    load_module_tensors(copies, modules)
    attach(registry, base, name, adapter, copies)


def restore_adapter(registry: AdapterRegistry, base: nn.Module, folder: _Path, name: str) -> None:
    """Set an adapter to a saved training state; see :meth:`reft.ReftModel.restore`."""
    adapter = registry.adapter(name)
    config, tensors = read_adapter(folder)
    _check_same(folder, config, adapter.config)
    edit, saved = _split(tensors)
    modules = registry.modules_to_save.modules_of(base, name)
    try:
        check_module_tensors(modules, saved)
        adapter.load(edit, training_state=True)
    except ValueError as error:
        raise ValueError(f"{os.fspath(folder)}: {error}{_explain(tensors)}") from None
    load_module_tensors(modules, saved)
    warn_of_another_base(folder, config, origin_of(base))


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the edit, and those of ``modules_to_save`` without their prefix."""
    edit = {key: value for key, value in tensors.items() if not key.startswith(MODULES_PREFIX)}
    modules = {
        key.removeprefix(MODULES_PREFIX): value
        for key, value in tensors.items()
        if key.startswith(MODULES_PREFIX)
    }
    return edit, modules


def _explain(tensors: Mapping[str, Tensor]) -> str:
    """A hint for a message if stored numbers are not finite."""
    if all(tensor.isfinite().all() for tensor in tensors.values() if tensor.dtype in FLOATS):
        return ""
    return "; the run had diverged when this was saved, resume from an earlier checkpoint"


def _check_same(path: _Path, stored: ReftConfig, present: ReftConfig) -> None:
    """Refuse a stored adapter of another configuration than the present one."""
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
