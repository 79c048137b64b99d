"""Adding adapters to a model and removing them: parameters, ``modules_to_save`` and hooks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from reft.adapter.device_cache import EditSite
from reft.adapter.multi_device import MultiDeviceParameters
from reft.adapter.parameters import AdapterParameters
from reft.config import ReftConfig
from reft.model import peft_compat, vocabulary
from reft.model.blocks import block_device
from reft.model.edit_hook import EditHook
from reft.model.frozen_heads import report_frozen_head
from reft.model.labels import restore_labels
from reft.model.modules_to_save import copy_modules
from reft.model.origins import origin_of, warn_of_another_base
from reft.model.registry import SUBMODULE, AdapterRegistry
from reft.model.tensor_parallel import refuse_incomplete_modules
from reft.model.tied_modules import refuse_untying, with_tied_modules


def build(
    registry: AdapterRegistry,
    base: nn.Module,
    name: str,
    config: ReftConfig,
    generator: torch.Generator | None = None,
) -> tuple[AdapterParameters | MultiDeviceParameters, dict[str, nn.Module]]:
    """Make an adapter without changing the model.

    Returns:
        Its parameters, and copies of its ``modules_to_save`` by path.

    Raises:
        ValueError: a name or configuration that does not fit the model.
    """
    registry.check_new_name(name)
    blocks = registry.blocks
    check_config(registry, config)
    if config.base_model_name_or_path is None:
        config = replace(config, base_model_name_or_path=origin_of(base))
    layers = config.resolve_layers(len(blocks.layers))
    with _originals(registry, base):
        paths = config.resolve_modules_to_save(_nameable(base))
        refuse_incomplete_modules(base, paths)
        _refuse_edited_modules(
            registry, base, [(layer, config.component) for layer in layers], paths
        )
        refuse_untying(base, paths)
        modules = copy_modules(base, paths)
    devices = [block_device(blocks.layers[layer]) for layer in layers]
    adapter: AdapterParameters | MultiDeviceParameters
    if len(set(devices)) == 1:
        adapter = AdapterParameters(
            config, layers, blocks.dim, device=devices[0], generator=generator
        )
    else:
        adapter = MultiDeviceParameters(
            config, layers, blocks.dim, devices=devices, generator=generator
        )
    return adapter, modules


def with_both_ends(registry: AdapterRegistry, base: nn.Module, config: ReftConfig) -> ReftConfig:
    """Add the modules that are tied to ``modules_to_save`` to the configuration.

    Raises:
        ValueError: the model has no such module, or it cannot stay tied.
    """
    if not (config.modules_to_save or config.task_type):
        return config
    with _originals(registry, base):
        return with_tied_modules(base, _nameable(base), config)


@contextmanager
def _originals(registry: AdapterRegistry, base: nn.Module) -> Iterator[None]:
    """Inside, the base has its original modules."""
    active = registry.modules_to_save.active
    registry.activate_modules(base, None)
    try:
        yield
    finally:
        registry.activate_modules(base, active)


def _nameable(base: nn.Module) -> list[str]:
    """Paths of the modules that an adapter may train in full."""
    excluded = (SUBMODULE, *peft_compat.trained_modules(base))
    return [
        path
        for path, _ in base.named_modules(remove_duplicate=False)
        if not any(f"{path}.".startswith(f"{prefix}.") for prefix in excluded)
    ]


def _refuse_edited_modules(
    registry: AdapterRegistry, base: nn.Module, edited: Sequence[EditSite], paths: Sequence[str]
) -> None:
    """Refuse ``modules_to_save`` that contain an edited module: hooks are on the original only.

    Raises:
        ValueError: with the path of the module.
    """
    edited_modules = {registry.blocks.module(*site): site for site in edited}
    for path in paths:
        for module in base.get_submodule(path).modules():
            if module in edited_modules:
                layer, component = edited_modules[module]
                raise ValueError(
                    "ReftConfig.modules_to_save must not contain an edited module; "
                    f"{path} contains the {component} of block {layer}"
                )


def attach(
    registry: AdapterRegistry,
    base: nn.Module,
    name: str,
    adapter: AdapterParameters | MultiDeviceParameters,
    modules: Mapping[str, nn.Module],
) -> None:
    """Add an adapter to the model, frozen and not active."""
    for module in (adapter, *modules.values()):
        module.requires_grad_(False).train(base.training)
    with registry.lock:
        registry.check_new_name(name)
        registry.adapters[name] = adapter
        registry.modules_to_save.add(name, modules)
        vocabulary.guard(base, registry.modules_to_save)
        place_hooks(registry)
    report_frozen_head(base, registry.blocks.path, name, modules)


def detach(registry: AdapterRegistry, base: nn.Module, name: str) -> None:
    """Remove an adapter from the model, with the hooks that no other adapter needs."""
    with registry.lock:
        if registry.modules_to_save.active == name:
            registry.activate_modules(base, None)
        registry.modules_to_save.remove(base, name)
        vocabulary.guard(base, registry.modules_to_save)
        del registry.adapters[name]
        registry.ends.pop(name, None)
        registry.pool.cache.forget(name)
        place_hooks(registry)


def detach_all(registry: AdapterRegistry, base: nn.Module, handles: Iterable[Any]) -> None:
    """Remove all adapters from a model, with everything that was added to it for them.

    Args:
        handles: removable handles of the other hooks and methods.
    """
    registry.modules_to_save.activate(base, None)
    vocabulary.release(base)
    restore_labels(base, registry.unnamed_labels)
    for handle in (*handles, *registry.handles.values()):
        handle.remove()
    delattr(base, SUBMODULE)


def check_config(registry: AdapterRegistry, config: ReftConfig) -> None:
    """Check that a configuration fits the model.

    Raises:
        ValueError: it names another list of blocks, a block or component that the model does not
            have, or image tokens of a model without images.
    """
    blocks = registry.blocks
    if config.block_path not in (None, blocks.path):
        raise ValueError(
            f"ReftConfig.block_path must be {blocks.path!r}, where this model's adapters are, "
            f"or None; got {config.block_path!r}"
        )
    for layer in config.resolve_layers(len(blocks.layers)):
        blocks.module(layer, config.component)
    if config.positions == "image" and registry.image_token is None:
        raise ValueError(
            'ReftConfig.positions must not be "image" for a model whose configuration names no '
            f"image_token_id, such as this {type(blocks.stack).__name__}"
        )


def place_hooks(registry: AdapterRegistry) -> None:
    """Have a hook on every module that an adapter, request or generation edits, and on no other."""
    with registry.lock:
        sources = [*map(registry.adapter, registry.adapters), *registry.pool.adapters.values()]
        for generation in registry.active_threads.generations.copy():
            sources.extend((generation.sources or {}).values())
        wanted = {site for source in sources for site in source.sites}
        for engine in registry.engines():
            for request in engine.requests():
                wanted.update(() if request.item is None else request.item.sites)
        # Another thread may be in the middle of a forward: its hooks stay until the next change.
        unneeded = registry.handles.keys() - wanted
        for site in () if registry.active_threads.others() else unneeded:
            registry.handles.pop(site).remove()
        for site in wanted - registry.handles.keys():
            registry.handles[site] = registry.blocks.module(*site).register_forward_hook(
                EditHook(registry, site), with_kwargs=True
            )


class PoolHost:
    """The model as the pool of adapters sees it; see :class:`reft.adapter.pool.Host`."""

    def __init__(self, registry: AdapterRegistry, base_name: str | None) -> None:
        self.registry, self.base_name = registry, base_name

    @property
    def num_layers(self) -> int:
        return len(self.registry.blocks.layers)

    @property
    def dim(self) -> int:
        return self.registry.blocks.dim

    def device_of(self, site: EditSite) -> torch.device:
        return block_device(self.registry.blocks.layers[site[0]])

    def check_new_name(self, name: str) -> None:
        self.registry.check_new_name(name)

    def check_config(self, config: ReftConfig) -> None:
        check_config(self.registry, config)

    def check_origin(self, path: str | os.PathLike[str], config: ReftConfig) -> None:
        warn_of_another_base(path, config, self.base_name)

    def pool_changed(self) -> None:
        place_hooks(self.registry)
