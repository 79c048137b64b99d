"""Where the residual stream of a model leaves its blocks, and what their parts add to it.

Blocks are found by structure: the ``ModuleList`` that is as long as the configuration says the
model has layers. No function, and no class, per architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reft.model.tensor_parallel import TensorParallelPlan, find_split, refuse_parts

#: Paths in a block of the module whose output a part adds to the residual stream; the first that
#: is there. Where attention or MLP add the residual themselves, or norm the sum, it is their last
#: projection.
COMPONENTS: dict[str, tuple[str, ...]] = {
    "attention_output": (
        "self_attention.dense",  # BLOOM, Falcon
        "attention.output.dense",  # BERT and its kin
        "attention.attn",  # MPNet
        "self_attn",
        "attn",
        "self_attention",
        "linear_attn",
        "multi_head_attention",
        "layer.0.SelfAttention",
        "layer.0.LocalSelfAttention",
        "layer.0.TransientGlobalSelfAttention",
        "attention",
    ),
    "mlp_output": (
        "mlp.dense_4h_to_h",  # BLOOM, Falcon, GPT-NeoX
        "ffn.down_proj",  # MPT
        "mlp",
        "feed_forward",
        "block_sparse_moe",
        "shared_mlp",
        "mlp_block",
        "ffn",
        "layer.2.DenseReluDense",
        "layer.2.mlp",
        "layer.1.DenseReluDense",
        "layer.1.mlp",
        "fc2",
        "output.dense",  # BERT and its kin
    ),
}

#: Norms, of attention and of MLP, that stand between a part and the residual sum, in blocks that
#: have all modules of the row: then theirs is the output that is added. One name does not say it:
#: Llama's ``post_attention_layernorm`` is the norm before the MLP, Nomic BERT's that of the sum.
NORMED: tuple[tuple[str, ...], ...] = (
    ("post_self_attn_layernorm", "post_mlp_layernorm"),  # GLM-4
    ("post_self_attn_layernorm", "post_feedforward_layernorm"),  # T5Gemma
    ("post_attention_layernorm", "post_feedforward_layernorm"),  # Gemma 2 to 4, OLMo 2, EXAONE 4
    ("post_attention_layernorm", "post_mlp_layernorm", "pre_mlp_layernorm"),  # AFMoE
    ("post_operator_norm", "post_ffn_norm"),  # LFM3
    ("post_norm1", "post_norm2"),  # HyperCLOVA X
)

#: Modules of which a block adds up the outputs: none of them is what the part adds.
SUMMED: dict[str, tuple[str, ...]] = {"mlp_output": ("block_sparse_moe", "shared_mlp")}

#: Prefix of a component that names a submodule of the block by its path.
MODULE = "module:"


@dataclass(frozen=True)
class ModelBlocks:
    """The blocks of a model.

    Attributes:
        path: name of the block list in the model; in the transformers model inside where PEFT
            has wrapped it, so that adapters fit the bare model too.
        blocks: the blocks, first to last.
        dim: D, the width of the residual stream.
        stack: the module whose forward runs the blocks and is handed their tokens: the model
            itself, the encoder or decoder of an encoder–decoder, or the encoder inside a model that
            chooses among several texts.
        side: "model", "encoder" or "decoder", which of these.
        split: the tensor parallelism that the model is under, or None.
        choices: whether the model is handed (batch, choices, tokens) and its stack one row a text.
    """

    path: str
    blocks: tuple[nn.Module, ...]
    dim: int
    stack: nn.Module
    side: str = "model"
    split: TensorParallelPlan | None = None
    choices: bool = False

    def module(self, layer: int, component: str) -> nn.Module:
        """The module whose output is a component of a block.

        Args:
            layer: number of the block.
            component: "block_output", a key of :data:`COMPONENTS`, or "module:<path in the block>".

        Raises:
            ValueError: the block has none, with its modules; the part is the sum of several; or,
                under tensor parallelism, no process has all of its output.
        """
        block = self.blocks[layer]
        if component == "block_output":
            return block
        # A list of modules is never called: it has no output.
        named: dict[str, nn.Module] = {
            path: module
            for path, module in block.named_modules()
            if path and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        }
        where = f"of block {layer}, a {type(block).__name__}"
        summed = SUMMED.get(component, ())
        if summed and all(path in named for path in summed):
            raise ValueError(
                f"ReftConfig.component must not be {component!r} {where}, which adds up the "
                f"outputs of {_modules(summed)}; name one of these"
            )
        for path in _candidates(component, named):
            if path in named:
                self._check_whole(component, path, named, where)
                return named[path]
        raise ValueError(
            f"ReftConfig.component {component!r} is no part {where}; name one of its modules: "
            f"{_modules(named)}"
        )

    def _check_whole(
        self, component: str, path: str, named: Mapping[str, nn.Module], where: str
    ) -> None:
        """Refuse a module whose output is spread over processes."""
        split = self.split
        obstacle = None if split is None else split.obstacle(self.path, component, path)
        if split is not None and obstacle is not None:
            whole = split.whole(self.path, named)
            modules = f", {_modules(whole)}" if whole else ""
            raise ValueError(
                f"ReftConfig.component must not be {component!r} {where}, under tensor parallelism "
                f"over {split.size} processes: {obstacle}, and an edit needs all of it; allowed: "
                f"block_output, {', '.join(COMPONENTS)}{modules}"
            )


def _candidates(component: str, named: Iterable[str]) -> list[str]:
    if component not in COMPONENTS:
        return [component.removeprefix(MODULE)]
    side = list(COMPONENTS).index(component)
    norms = [row[side] for row in NORMED if all(name in named for name in row)]
    return [*norms, *COMPONENTS[component]]


def _modules(paths: Iterable[str]) -> str:
    return ", ".join(f"{MODULE}{path}" for path in paths) or "it has none"


def find_blocks(model: nn.Module, block_path: str | None = None) -> ModelBlocks:
    """Find the blocks of a model.

    Args:
        model: a transformers model, or a module with such a ``config``.
        block_path: name of the block list, a ``ModuleList`` or ``Sequential``, for layouts that
            structure does not tell, and to say which side of an encoder–decoder is edited.

    Raises:
        TypeError: the model has no configuration.
        ValueError: no list of that name, none or several lists that may be the blocks, then with
            the candidates; an encoder–decoder without a path; a model of which this process has
            some of the blocks or of the tokens.
    """
    config = _text_config(model)
    inner = _inner(model)
    refuse_parts(inner)
    split = find_split(inner)
    lists = {
        name: module
        for name, module in inner.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    path = block_path
    two_sided = _is_encoder_decoder(inner)
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
    if not two_sided:
        # What chooses among several texts hands them, one a row, to the encoder inside it.
        choices = type(inner).__name__.endswith("ForMultipleChoice")
        top = _stack(inner, path)[0] if choices else model
        return ModelBlocks(path, tuple(blocks), _width(config), top, "model", split, choices)
    stack, side = _stack(inner, path)
    # The sides of some encoder–decoders have configurations, and widths, of their own.
    own = _text_config(stack) if hasattr(stack, "config") else config
    return ModelBlocks(path, tuple(blocks), _width(own), stack, side, split)


def block_device(block: nn.Module) -> torch.device:
    """Where a block computes: the device of its output, which its parameters may not be on."""
    # accelerate hooks the parts alone where a device map names parts of blocks.
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
            f"base_model.config must say hidden_size, the width of the blocks' output; "
            f"{type(config).__name__} says {dim!r}"
        )
    return dim


def _is_encoder_decoder(model: nn.Module) -> bool:
    # The whole model's configuration says it: that of its text may be its decoder's alone.
    if not getattr(model.config, "is_encoder_decoder", False):
        return False
    # The encoder of such a model alone, as T5EncoderModel, keeps the flag or not.
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


def _inner(model: nn.Module) -> nn.Module:
    """The transformers model in a model that PEFT has wrapped."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def _stack(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The encoder or decoder that holds the list ``path``."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = model.get_submodule(".".join(parts[:end]))
        takes = inspect.signature(module.forward).parameters
        if "input_ids" in takes or "inputs_embeds" in takes:
            side = "decoder" if any("decoder" in part for part in parts[:end]) else "encoder"
            return module, side
    raise ValueError(
        f"ReftConfig.block_path must name blocks of the encoder or of the decoder, got {path!r}, "
        f"which lie in no module of {type(model).__name__} that is handed tokens"
    )


def _inside_another(name: str, lists: Mapping[str, nn.ModuleList]) -> bool:
    """A list inside a block is part of that block."""
    return any(name.startswith(f"{other}.") for other in lists if other != name)


def _by_length(model: nn.Module, lists: dict[str, nn.ModuleList], num_layers: int | None) -> str:
    fitting = {name: found for name, found in lists.items() if len(found) == num_layers}
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


def _listing(lists: dict[str, nn.ModuleList]) -> str:
    return ", ".join(f"{name} ({len(found)})" for name, found in lists.items()) or "none"
