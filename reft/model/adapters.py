"""Adapters put on a model and taken off it: bank, heads and the hooks of their blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from reft.config import ReftConfig
from reft.model import peft_base
from reft.model.attachment import SUBMODULE, Attachment
from reft.model.heads import copy_heads
from reft.model.hooks import EditOutput
from reft.model.plan import Site
from reft.model.sites import site_device
from reft.nn.bank import Bank
from reft.nn.spread import SpreadBank


def build(
    attached: Attachment,
    base: nn.Module,
    name: str,
    config: ReftConfig,
    generator: torch.Generator | None = None,
) -> tuple[Bank | SpreadBank, dict[str, nn.Module]]:
    """The parts of a new adapter, its bank and its heads; nothing on the model changes.

    Raises:
        ValueError: a name or configuration that does not fit.
    """
    attached.check_new_name(name)
    sites = attached.sites
    if config.block_path not in (None, sites.path):
        raise ValueError(
            f"ReftConfig.block_path must be {sites.path!r}, where this model's adapters are, "
            f"or None; got {config.block_path!r}"
        )
    if config.base_model_name_or_path is None:
        origin = getattr(getattr(base, "config", None), "_name_or_path", None)
        config = replace(config, base_model_name_or_path=origin or None)
    layers = config.resolve_layers(len(sites.blocks))
    for layer in layers:
        sites.module(layer, config.component)
    if config.positions == "image" and attached.image_token is None:
        raise ValueError(
            'ReftConfig.positions must not be "image" for a model whose configuration names no '
            f"image_token_id, such as this {type(base).__name__}"
        )
    shown = attached.heads.shown
    attached.heads.show(base, None)
    try:
        others = (SUBMODULE, *peft_base.trained_modules(base))
        outside = (
            path
            for path, _ in base.named_modules()
            if not any(f"{path}.".startswith(f"{other}.") for other in others)
        )
        heads = copy_heads(base, config.resolve_modules_to_save(outside))
    finally:
        attached.heads.show(base, shown)
    devices = [site_device(sites.blocks[layer]) for layer in layers]
    bank: Bank | SpreadBank
    if len(set(devices)) == 1:
        bank = Bank(config, layers, sites.dim, device=devices[0], generator=generator)
    else:
        bank = SpreadBank(config, layers, sites.dim, devices=devices, generator=generator)
    return bank, heads


def attach(
    attached: Attachment,
    base: nn.Module,
    name: str,
    bank: Bank | SpreadBank,
    heads: Mapping[str, nn.Module],
) -> None:
    """Put an adapter on the model, frozen and not active."""
    attached.adapters[name] = bank
    attached.heads.add(name, heads)
    for module in (bank, *heads.values()):
        module.requires_grad_(False).train(base.training)
    for site in _sites(bank):
        if site not in attached.handles:
            attached.handles[site] = attached.sites.module(*site).register_forward_hook(
                EditOutput(attached, site), with_kwargs=True
            )


def detach(attached: Attachment, base: nn.Module, name: str) -> None:
    """Take an adapter off the model, with the hooks that no other needs."""
    attached.heads.remove(base, name)
    del attached.adapters[name]
    used = {site for other in attached.adapters for site in _sites(attached.bank(other))}
    for site in attached.handles.keys() - used:
        attached.handles.pop(site).remove()


def _sites(bank: Bank | SpreadBank) -> list[Site]:
    return [(layer, bank.config.component) for layer in bank.layers]
