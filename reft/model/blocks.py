"""The blocks of a model, whose outputs are edited.

Blocks are found by structure: the ``ModuleList`` with as many entries as the configuration has
layers. There is no function or class per architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reft.config import COMPONENTS
from reft.model.components import callable_modules, find_component, list_modules
from reft.model.peft_compat import transformers_model
from reft.model.tensor_parallel import TensorParallelPlan, find_plan, refuse_partial_prompts


@dataclass(frozen=True)
class ModelBlocks:
    """The blocks of a model.

    Attributes:
        path: name of the block list in the transformers model, inside PEFT's wrapper if there is
            one, so that adapters fit the model with and without it.
        layers: the blocks, first to last.
        dim: D, the width of the residual stream.
        stack: the module whose forward runs the blocks and receives their tokens: the model itself,
            the encoder or decoder of an encoder–decoder, or the encoder inside a multiple-choice
            model.
        side: which of these it is: "model", "encoder" or "decoder".
        tensor_parallel: the tensor parallelism that the model is under, or None.
        choices: whether the model takes (batch, choices, tokens) and its stack one choice a row.
    """

    path: str
    layers: tuple[nn.Module, ...]
    dim: int
    stack: nn.Module
    side: str = "model"
    tensor_parallel: TensorParallelPlan | None = None
    choices: bool = False

    def module(self, layer: int, component: str) -> nn.Module:
        """The module whose output is a component of a block.

        Args:
            layer: number of the block.
            component: "block_output", "attention_output", "mlp_output", or
                "module:<path in the block>".

        Raises:
            ValueError: the block has no such component, or it is a sum of several modules' outputs;
                under tensor parallelism, the output is not replicated.
        """
        block = self.layers[layer]
        if component == "block_output":
            return block
        where = f"of block {layer}, a {type(block).__name__}"
        path, module = find_component(block, component, where)
        self._check_replicated(block, component, path, where)
        return module

    def _check_replicated(self, block: nn.Module, component: str, path: str, where: str) -> None:
        """Refuse a module whose output is split between processes."""
        plan = self.tensor_parallel
        reason = None if plan is None else plan.why_not_replicated(self.path, component, path)
        if plan is not None and reason is not None:
            replicated = plan.replicated(self.path, callable_modules(block))
            modules = f", {list_modules(replicated)}" if replicated else ""
            raise ValueError(
                f"ReftConfig.component must not be {component!r} {where}, under tensor parallelism "
                f"over {plan.size} processes: {reason}, and an edit needs all of it; allowed: "
                f"{', '.join(COMPONENTS)}{modules}"
            )


def find_blocks(model: nn.Module, block_path: str | None = None) -> ModelBlocks:
    """Find the blocks of a model.

    Args:
        model: a transformers model, or a module with such a ``config``.
        block_path: name of the block list, a ``ModuleList`` or ``Sequential``. It is needed for
            layouts that structure alone does not tell, and for an encoder–decoder, to choose the
            side that is edited.

    Raises:
        TypeError: the model has no configuration.
        ValueError: ``block_path`` names no list of modules; no list, or more than one, can be the
            blocks; an encoder–decoder without ``block_path``; a model of which this process has
            only some of the blocks or tokens.
    """
    config = _text_config(model)
    inner = transformers_model(model)
    refuse_partial_prompts(inner)
    plan = find_plan(inner)
    lists = {
        name: module
        for name, module in inner.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    two_sided = _is_encoder_decoder(inner)
    path = block_path
    if path is None and two_sided:
        sides = [f'"{name}"' for name in lists if not _inside_another(name, lists)]
        raise ValueError(
            f"ReftConfig.block_path must say which side of the encoder–decoder "
            f"{type(inner).__name__} is edited: {' or '.join(sides)}"
        )
    if path is None:
        path = _by_length(inner, lists, getattr(config, "num_hidden_layers", None))
    blocks = lists.get(path) or dict(inner.named_modules()).get(path)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not len(blocks):
        raise ValueError(
            f"ReftConfig.block_path must name a list of modules of {type(inner).__name__}, got "
            f"{path!r}; it has {_listing(lists)}"
        )
    if two_sided:
        stack, side = _stack(inner, path)
        # The sides of some encoder–decoders have configurations, and widths, of their own.
        config = _text_config(stack) if hasattr(stack, "config") else config
        return ModelBlocks(path, tuple(blocks), _width(config), stack, side, plan)
    # A multiple-choice model hands the choices, one a row, to the encoder inside it.
    choices = type(inner).__name__.endswith("ForMultipleChoice")
    stack = _stack(inner, path)[0] if choices else model
    return ModelBlocks(path, tuple(blocks), _width(config), stack, "model", plan, choices)


def block_device(block: nn.Module) -> torch.device:
    """The device of a block's output, which may differ from that of its parameters."""
    # If a device map names parts of blocks, accelerate hooks these parts and not the block.
    for module in block.modules():
        execution = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
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


def _width(config: Any) -> int:
    dim = getattr(config, "hidden_size", None)
    if not isinstance(dim, int):
        raise ValueError(
            f"base_model.config must have hidden_size, the width of the blocks' output, as an int; "
            f"{type(config).__name__} has {dim!r}"
        )
    return dim


def _is_encoder_decoder(model: nn.Module) -> bool:
    # The flag is read from the whole model's configuration: the text's may be the decoder's alone.
    if not getattr(model.config, "is_encoder_decoder", False):
        return False
    # The encoder of such a model alone, such as T5EncoderModel, may keep the flag.
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


def _stack(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The encoder or decoder that holds the list ``path``, and which of the two it is."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = model.get_submodule(".".join(parts[:end]))
        parameters = inspect.signature(module.forward).parameters
        if "input_ids" in parameters or "inputs_embeds" in parameters:
            side = "decoder" if any("decoder" in part for part in parts[:end]) else "encoder"
            return module, side
    raise ValueError(
        f"ReftConfig.block_path must name blocks of the encoder or of the decoder, got {path!r}, "
        f"which lie in no module of {type(model).__name__} that takes tokens"
    )


def _inside_another(name: str, lists: Mapping[str, nn.ModuleList]) -> bool:
    """Whether a list lies inside an entry of another, so that it is part of a block."""
    return any(name.startswith(f"{other}.") for other in lists if other != name)


def _by_length(model: nn.Module, lists: dict[str, nn.ModuleList], num_layers: int | None) -> str:
    fitting = [name for name, modules in lists.items() if len(modules) == num_layers]
    outer = [name for name in fitting if not _inside_another(name, lists)]
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


def _listing(lists: Mapping[str, nn.ModuleList]) -> str:
    return ", ".join(f"{name} ({len(modules)})" for name, modules in lists.items()) or "none"
