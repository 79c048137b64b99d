"""Components: the outputs that attention and MLP add to the residual stream, in blocks of every
build. The criterion: x + component is again a state of the stream, for some earlier state x."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import transformers
from architectures import (
    ARCHITECTURES,
    BERT,
    DIM,
    EXPERTS,
    LAYERS,
    LLAMA,
    SHAPE,
    T5,
    VOCAB,
    Architecture,
    construct,
)
from tiny_models import tokens
from torch import Tensor, nn

from reft import ReftConfig, get_reft_model
from reft.model.blocks import find_blocks
from reft.model.components import COMPONENT_PATHS, POST_NORMS

PARTS = ("attention_output", "mlp_output")
T5GEMMA = {
    **LLAMA, "query_pre_attn_scalar": 6, "attention_dropout": 0.0, "layer_types":
    ["full_attention"] * LAYERS, "model_type": "t5_gemma_module",
}  # fmt: skip
HYBRID = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 6,
    "linear_value_head_dim": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A model and the paths of its components; None if block 0 has no such module."""

    model: str
    config: str
    arguments: dict
    attention: str | None
    mlp: str | None
    block_path: str | None = None
    image: bool = False


def _causal(name: str, attention: str | None, mlp: str | None, arguments: dict, **more) -> Block:
    given = {**arguments, **more}
    return Block(f"{name}ForCausalLM", f"{name}Config", given, attention, mlp)


#: Builds that the table of ``architectures`` lacks.
OTHERS = {
    "mpnet": Block(
        "MPNetModel", "MPNetConfig", BERT, "attention.attn", "output.dense"
    ),
    "distilbert": Block(
        "DistilBertModel", "DistilBertConfig",
        {"vocab_size": VOCAB, "dim": DIM, "hidden_dim": 32, "n_layers": LAYERS, "n_heads": 4,
         "dropout": 0.0, "attention_dropout": 0.0},
        "attention", "ffn",
    ),
    "nomic-bert": Block(
        "NomicBertModel", "NomicBertConfig", {**BERT, "head_dim": 6}, "self_attn", "mlp"
    ),
    "gpt-j": _causal(
        "GPTJ", "attn", "mlp",
        {"vocab_size": VOCAB, "n_embd": DIM, "n_layer": LAYERS, "n_head": 4, "n_positions": 64,
         "rotary_dim": 2},
    ),
    "exaone4": _causal(
        "Exaone4", "post_attention_layernorm", "post_feedforward_layernorm", LLAMA,
        layer_types=["full_attention"] * LAYERS,
    ),
    "afmoe": _causal(
        "Afmoe", "post_attention_layernorm", "post_mlp_layernorm", EXPERTS, num_experts=4,
        num_local_experts=4, num_dense_layers=1, num_shared_experts=1,
    ),
    "lfm3": _causal("Lfm3", "post_operator_norm", "post_ffn_norm", LLAMA),
    "hyperclovax": _causal("HyperCLOVAX", "post_norm1", "post_norm2", LLAMA),
    "lfm2": _causal(
        "Lfm2", "self_attn", "feed_forward", LLAMA, layer_types=["full_attention"] * LAYERS
    ),
    "granite-moe": _causal(
        "GraniteMoe", "self_attn", "block_sparse_moe", LLAMA, num_local_experts=4
    ),
    "granite-hybrid": _causal(
        "GraniteMoeHybrid", "self_attn", "shared_mlp", LLAMA, num_local_experts=0,
        shared_intermediate_size=16, layer_types=["full_attention"] * LAYERS,
        mamba_n_heads=6, mamba_d_head=8,
    ),
    "granite-moe-shared": _causal(
        "GraniteMoeShared", "self_attn", None, LLAMA, num_local_experts=4,
        shared_intermediate_size=16,
    ),
    "qwen3-next": _causal(
        "Qwen3Next", "linear_attn", "mlp", {**EXPERTS, **HYBRID, **LINEAR}, num_experts=4,
        shared_expert_intermediate_size=16, use_cache=False,
    ),
    "recurrent-gemma": _causal(
        "RecurrentGemma", None, "mlp_block", LLAMA, lru_width=DIM, attention_window_size=16
    ),
    "jetmoe": _causal(
        "JetMoe", "self_attention", "mlp", SHAPE, num_key_value_heads=4, kv_channels=6,
        num_local_experts=4, num_experts_per_tok=1,
    ),
    "ctrl": Block(
        "CTRLLMHeadModel", "CTRLConfig",
        {"vocab_size": VOCAB, "n_embd": DIM, "dff": 32, "n_layer": LAYERS, "n_head": 4,
         "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        "multi_head_attention", "ffn",
    ),
    "mamba": _causal(
        "Mamba", None, None, {"vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": LAYERS}
    ),
    "longt5-local": Block(
        "LongT5ForConditionalGeneration", "LongT5Config", T5,
        "layer.0.LocalSelfAttention", "layer.1.DenseReluDense", "encoder.block",
    ),
    "longt5-global": Block(
        "LongT5ForConditionalGeneration", "LongT5Config",
        {**T5, "encoder_attention_type": "transient-global"},
        "layer.0.TransientGlobalSelfAttention", "layer.1.DenseReluDense", "encoder.block",
    ),
    "switch-encoder": Block(
        "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig",
        {**T5, "num_experts": 2}, "layer.0.SelfAttention", "layer.1.mlp", "encoder.block",
    ),
    "switch-decoder": Block(
        "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig",
        {**T5, "num_experts": 2}, "layer.0.SelfAttention", "layer.2.mlp", "decoder.block",
    ),
    "t5gemma": Block(
        "T5GemmaForConditionalGeneration", "T5GemmaConfig",
        {"encoder": {**T5GEMMA, "hidden_size": 16}, "decoder": {**T5GEMMA, "is_decoder": True},
         "vocab_size": VOCAB},
        "post_self_attn_layernorm", "post_feedforward_layernorm", "model.decoder.layers",
    ),
}  # fmt: skip


def everything() -> dict[str, Block]:
    """These builds and those of ``architectures``."""
    table = {
        name: Block(a.model, a.config, a.arguments, a.attention, a.mlp, a.block_path, a.image)
        for name, a in ARCHITECTURES.items()
        if not a.image  # its blocks are Llama's
    }
    return {**table, **OTHERS}


BLOCKS = everything()


def tiny(name: str) -> nn.Module:
    block = BLOCKS[name]
    if not hasattr(transformers, block.model):
        pytest.skip(f"this version of transformers has no {block.model}")
    return construct(Architecture(block.model, block.config, block.arguments, ""))


def forward(model: nn.Module, name: str) -> None:
    ids = tokens(2, 7)
    more = {} if BLOCKS[name].block_path is None else {"decoder_input_ids": tokens(2, 7, seed=2)}
    with torch.no_grad():
        model(input_ids=ids, **more)


def first(value) -> Tensor | None:
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


class Stream:
    """States inside a block, and the outputs of its components.

    States are the inputs of the block and its modules, and the outputs of the block and its norms.
    """

    def __init__(self, block: nn.Module, parts: dict[str, nn.Module]) -> None:
        self.states: list[Tensor] = []
        self.parts: dict[str, Tensor] = {}
        for module in block.modules():
            module.register_forward_pre_hook(self._given, with_kwargs=True)
            if module is block or "norm" in type(module).__name__.lower():
                module.register_forward_hook(lambda module, args, out: self._state(first(out)))
        for part, module in parts.items():
            module.register_forward_hook(lambda module, args, out, part=part: self._part(part, out))

    def _given(self, module, args, kwargs) -> None:
        for value in (*args, *kwargs.values()):
            self._state(first(value))

    def _state(self, value: Tensor | None) -> None:
        if value is not None and value.shape[-1:] == (DIM,) and value.numel() == 14 * DIM:
            self.states.append(value.detach().reshape(14, DIM).clone())

    def _part(self, part: str, output) -> None:
        self.parts[part] = first(output).detach().reshape(14, DIM).clone()

    def adds(self, part: str) -> bool:
        """Whether a state plus the part, or plus both parts if they are parallel, is a state."""
        added = self.parts[part]
        others = [value for name, value in self.parts.items() if name != part]
        before = [
            x for x in self.states if not any(_same(x, value) for value in self.parts.values())
        ]
        sums = [x + added for x in before] + [x + added + y for x in before for y in others]
        return any(_same(total, y) for total in sums for y in self.states)


def _same(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).abs().max() <= 2e-5 * right.abs().max().clamp(min=1))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_part_is_what_is_added(name):
    expected = BLOCKS[name]
    model = tiny(name)
    blocks = find_blocks(model, expected.block_path)
    assert (len(blocks.layers), blocks.dim) == (LAYERS, DIM)
    paths = dict(zip(PARTS, (expected.attention, expected.mlp), strict=True))
    for part, path in paths.items():
        if path is None:
            with pytest.raises(ValueError, match=rf"'{part}'.*of block 0.*module:"):
                blocks.module(0, part)
        else:
            assert blocks.module(0, part) is blocks.layers[0].get_submodule(path)
    parts = {part: blocks.module(0, part) for part, path in paths.items() if path is not None}
    stream = Stream(blocks.layers[0], parts)
    forward(model, name)
    for part in parts:
        assert stream.parts[part].abs().max() > 1e-4
        assert stream.adds(part), part


def test_the_criterion_can_fail():
    """The output of attention is not what is added if a norm follows, or if attention itself adds
    the residual or normalises the sum."""
    for name, path in (
        ("gemma2", "self_attn"),
        ("bloom", "self_attention"),
        ("bert", "attention"),
        ("mpnet", "attention"),
    ):
        model = tiny(name)
        blocks = find_blocks(model)
        stream = Stream(
            blocks.layers[0],
            {
                "attention_output": blocks.layers[0].get_submodule(path),
                "mlp_output": blocks.module(0, "mlp_output"),
            },
        )
        forward(model, name)
        assert not stream.adds("attention_output"), name


def test_every_row_of_the_tables_is_used_by_a_model():
    if not all(hasattr(transformers, block.model) for block in BLOCKS.values()):
        pytest.skip("this version of transformers has not all of these models")
    used = {path for block in BLOCKS.values() for path in (block.attention, block.mlp)}
    rows = {path for paths in COMPONENT_PATHS.values() for path in paths}
    assert rows <= used
    pairs = {(block.attention, block.mlp) for block in BLOCKS.values()}
    assert {row[:2] for row in POST_NORMS} <= pairs


def test_experts_beside_a_shared_mlp_are_edited_by_name():
    model = tiny("granite-moe-shared")
    says = r"adds up the outputs of module:block_sparse_moe, module:shared_mlp; name one"
    with pytest.raises(ValueError, match=says):
        get_reft_model(model, ReftConfig(rank=2, component="mlp_output"))
    get_reft_model(model, ReftConfig(rank=2, component="module:shared_mlp"))(tokens(2, 7))


def test_an_attention_that_not_every_block_has():
    """The error lists the modules of a block that has none."""
    model = tiny("recurrent-gemma")
    with pytest.raises(ValueError, match=r"no part of block 0.*module:temporal_block"):
        get_reft_model(model, ReftConfig(rank=2, component="attention_output"))
    wrapped = get_reft_model(model, ReftConfig(rank=2, component="module:temporal_block"))
    wrapped(tokens(2, 7))


def test_the_width_is_that_of_the_side():
    model = tiny("t5gemma")
    says = 'is edited: "model.encoder.layers" or "model.decoder.layers"'
    with pytest.raises(ValueError, match=says):
        find_blocks(model)
    assert find_blocks(model, "model.encoder.layers").dim == 16
    assert find_blocks(model, "model.decoder.layers").dim == DIM
