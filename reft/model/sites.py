"""Where the residual stream of a model leaves its blocks.

Blocks are found by structure: the ``ModuleList`` that is as long as the configuration says the
model has layers. No function, and no class, per architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: model_type -> path of the block list, where its length does not tell it from others.
EXCEPTIONS: dict[str, str] = {}


@dataclass(frozen=True)
class Sites:
    """The blocks of a model.

    Attributes:
        path: name of the block list in the model.
        blocks: the blocks, first to last.
        dim: D, the width of the residual stream.
    """

    path: str
    blocks: tuple[nn.Module, ...]
    dim: int


def find_sites(model: nn.Module, block_path: str | None = None) -> Sites:
    """Find the blocks of a model.

    Args:
        model: a transformers model, or a module with such a ``config``.
        block_path: name of the block list, for layouts that structure does not tell.

    Raises:
        TypeError: the model has no configuration.
        ValueError: an encoder–decoder, no list of that name, or none or several lists that may
            be the blocks; then with the candidates.
    """
    config = _text_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"base_model must be one stack of blocks; {type(model).__name__} is an "
            "encoder–decoder, whose generate() calls the encoder past any hook on the model"
        )
    dim = getattr(config, "hidden_size", None)
    if not isinstance(dim, int):
        raise ValueError(
            f"base_model.config must say hidden_size, the width of the blocks' output; "
            f"{type(config).__name__} says {dim!r}"
        )
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    path = block_path or EXCEPTIONS.get(str(getattr(config, "model_type", None)))
    if path is None:
        path = _by_length(model, lists, getattr(config, "num_hidden_layers", None))
    if path not in lists:
        raise ValueError(
            f"ReftConfig.block_path must name a ModuleList of {type(model).__name__}, got "
            f"{path!r}; it has {_listing(lists)}"
        )
    return Sites(path, tuple(lists[path]), dim)


def site_device(block: nn.Module) -> torch.device:
    """Where a block computes: the device of its output, which its parameters may not be on."""
    hook = getattr(block, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    if execution is not None:
        return torch.device(execution)
    tensor: Tensor | None = next(block.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise TypeError(
            f"base_model must be a transformers model (a module with a config), got "
            f"{type(model).__name__}"
        )
    get_text_config = getattr(config, "get_text_config", None)
    return config if get_text_config is None else get_text_config()


def _by_length(model: nn.Module, lists: dict[str, nn.ModuleList], num_layers: int | None) -> str:
    fitting = {name: found for name, found in lists.items() if len(found) == num_layers}
    # A list inside a block is part of that block.
    outer = [
        name
        for name in fitting
        if not any(name.startswith(f"{other}.") for other in lists if other != name)
    ]
    if len(outer) > 1:
        # A composite model, such as vision and text: transformers knows its text decoder.
        decoder = _decoder(model)
        inside = {id(module) for module in decoder.modules()} if decoder is not None else set()
        outer = [name for name in outer if id(lists[name]) in inside] or outer
    if len(outer) != 1:
        raise ValueError(
            f"cannot tell the blocks of {type(model).__name__}: of its lists of modules, "
            f"{_listing(lists)}, {len(outer)} have config.num_hidden_layers = {num_layers} "
            'entries. Name the list: ReftConfig(block_path="…")'
        )
    return outer[0]


def _decoder(model: nn.Module) -> nn.Module | None:
    get_decoder = getattr(model, "get_decoder", None)
    decoder = None if get_decoder is None else get_decoder()
    return decoder if isinstance(decoder, nn.Module) and decoder is not model else None


def _listing(lists: dict[str, nn.ModuleList]) -> str:
    return ", ".join(f"{name} ({len(found)})" for name, found in lists.items()) or "none"
