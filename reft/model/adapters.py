"""Adapters put on a model and taken off it: bank, heads and the hooks of their blocks."""

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
from reft.model.batch import sites_of
from reft.model.blocks import block_device
from reft.model.frozen_heads import report_frozen_head
from reft.model.hooks import EditOutput
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
    """The parts of an adapter, its bank and its heads; nothing on the model changes.

    Raises:
        ValueError: a name or configuration that does not fit.
    """
    registry.check_new_name(name)
    sites = registry.sites
    check_config(registry, config)
    if config.base_model_name_or_path is None:
        config = replace(config, base_model_name_or_path=origin_of(base))
    layers = config.resolve_layers(len(sites.layers))
    with _originals(registry, base):
        paths = config.resolve_modules_to_save(_nameable(base))
        refuse_incomplete_modules(base, paths)
        _refuse_edited_heads(registry, base, [(layer, config.component) for layer in layers], paths)
        refuse_untying(base, paths)
        heads = copy_modules(base, paths)
    devices = [block_device(sites.layers[layer]) for layer in layers]
    adapter: AdapterParameters | MultiDeviceParameters
    if len(set(devices)) == 1:
        adapter = AdapterParameters(
            config, layers, sites.dim, device=devices[0], generator=generator
        )
    else:
        adapter = MultiDeviceParameters(
            config, layers, sites.dim, devices=devices, generator=generator
        )
    return adapter, heads


def with_both_ends(registry: AdapterRegistry, base: nn.Module, config: ReftConfig) -> ReftConfig:
    """The configuration of a new adapter, whose ``modules_to_save`` name what is tied to them too.

    Raises:
        ValueError: a module that is not there, or one that cannot stay tied.
    """
    if not (config.modules_to_save or config.task_type):
        return config
    with _originals(registry, base):
        return with_tied_modules(base, _nameable(base), config)


@contextmanager
def _originals(registry: AdapterRegistry, base: nn.Module) -> Iterator[None]:
    """Inside, the base's own modules are in it."""
    active = registry.modules_to_save.active
    registry.activate_modules(base, None)
    try:
        yield
    finally:
        registry.activate_modules(base, active)


def _nameable(base: nn.Module) -> list[str]:
    """Paths of the modules that an adapter may train in full."""
    others = (SUBMODULE, *peft_compat.trained_modules(base))
    return [
        path
        for path, _ in base.named_modules(remove_duplicate=False)
        if not any(f"{path}.".startswith(f"{other}.") for other in others)
    ]


def _refuse_edited_heads(
    registry: AdapterRegistry, base: nn.Module, edited: Sequence[EditSite], paths: Sequence[str]
) -> None:
    """A copy that stood for what is edited would not be: hooks are on the original.

    Raises:
        ValueError: modules that are trained in full contain what is edited.
    """
    inside = {registry.sites.module(*site): site for site in edited}
    for path in paths:
        for module in base.get_submodule(path).modules():
            if module in inside:
                layer, component = inside[module]
                raise ValueError(
                    f"ReftConfig.modules_to_save must not contain what is edited; {path} contains "
                    f"the {component} of block {layer}"
                )


def attach(
    registry: AdapterRegistry,
    base: nn.Module,
    name: str,
    adapter: AdapterParameters | MultiDeviceParameters,
    heads: Mapping[str, nn.Module],
) -> None:
    """Put an adapter on the model, frozen and not active."""
    for module in (adapter, *heads.values()):
        module.requires_grad_(False).train(base.training)
    with registry.lock:
        registry.check_new_name(name)
        registry.adapters[name] = adapter
        registry.modules_to_save.add(name, heads)
        vocabulary.guard(base, registry.modules_to_save)
        place_hooks(registry)
    report_frozen_head(base, registry.sites.path, name, heads)


def detach(registry: AdapterRegistry, base: nn.Module, name: str) -> None:
    """Take an adapter off the model, with the hooks that no other needs."""
    with registry.lock:
        if registry.modules_to_save.active == name:
            registry.activate_modules(base, None)
        registry.modules_to_save.remove(base, name)
        vocabulary.guard(base, registry.modules_to_save)
        del registry.adapters[name]
        registry.ends.pop(name, None)
        registry.pool.forget_bank(name)
        place_hooks(registry)


def take_off(registry: AdapterRegistry, base: nn.Module, handles: Iterable[Any]) -> None:
    """Take all adapters off a model, with everything else that stands on it for them.

    Args:
        handles: of what was put on it beside the hooks of adapters; each is removed.
    """
    registry.modules_to_save.activate(base, None)
    vocabulary.release(base)
    restore_labels(base, registry.unnamed_labels)
    for handle in (*handles, *registry.handles.values()):
        handle.remove()
    delattr(base, SUBMODULE)


def check_config(registry: AdapterRegistry, config: ReftConfig) -> None:
    """Refuse a configuration that the model has no place for.

    Raises:
        ValueError: another list of blocks, a block or a component that is not there, image tokens
            where the model has none.
    """
    sites = registry.sites
    if config.block_path not in (None, sites.path):
        raise ValueError(
            f"ReftConfig.block_path must be {sites.path!r}, where this model's adapters are, "
            f"or None; got {config.block_path!r}"
        )
    for layer in config.resolve_layers(len(sites.layers)):
        sites.module(layer, config.component)
    if config.positions == "image" and registry.image_token is None:
        raise ValueError(
            'ReftConfig.positions must not be "image" for a model whose configuration names no '
            f"image_token_id, such as this {type(sites.stack).__name__}"
        )


def place_hooks(registry: AdapterRegistry) -> None:
    """A hook where some adapter, request or generation edits, and nowhere else."""
    with registry.lock:
        sources = [*map(registry.adapter, registry.adapters), *registry.pool.adapters.values()]
        for generation in registry.running.generations.copy():
            sources.extend((generation.sources or {}).values())
        wanted = {site for source in sources for site in sites_of(source)}
        for engine in registry.engines():
            for request in engine.requests():
                wanted.update(() if request.resident is None else request.resident.sites)
        # A forward of another thread may have passed some of its blocks and not the others: what it
        # needs stays until the next change.
        unneeded = registry.handles.keys() - wanted
        for site in () if registry.running.elsewhere() else unneeded:
            registry.handles.pop(site).remove()
        for site in wanted - registry.handles.keys():
            registry.handles[site] = registry.sites.module(*site).register_forward_hook(
                EditOutput(registry, site), with_kwargs=True
            )


class PoolHost:
    """What the pool of adapters asks of the model; see :class:`reft.adapter.pool.Host`."""

    def __init__(self, registry: AdapterRegistry, base_name: str | None) -> None:
        self.registry, self.base_name = registry, base_name

    @property
    def num_layers(self) -> int:
        return len(self.registry.sites.layers)

    @property
    def dim(self) -> int:
        return self.registry.sites.dim

    def device_of(self, site: EditSite) -> torch.device:
        return block_device(self.registry.sites.layers[site[0]])

    def check_new_name(self, name: str) -> None:
        self.registry.check_new_name(name)

    def check_config(self, config: ReftConfig) -> None:
        check_config(self.registry, config)

    def check_origin(self, path: str | os.PathLike[str], config: ReftConfig) -> None:
        warn_of_another_base(path, config, self.base_name)

    def pool_changed(self) -> None:
        place_hooks(self.registry)
