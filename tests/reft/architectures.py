"""One tiny configuration of every tested architecture."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from tiny_models import tokens
from torch import nn

from reft import ReftConfig, get_reft_model

VOCAB, DIM, LAYERS, PAD = 40, 24, 3, 0
IMAGE = VOCAB - 1

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {**SHAPE, "num_key_value_heads": 2, "head_dim": 6}
BERT = {**SHAPE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXPERTS = {**LLAMA, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T5 = {
    "vocab_size": VOCAB,
    "d_model": DIM,
    "d_kv": 6,
    "d_ff": 32,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "initializer_factor": 1.0,
    "pad_token_id": PAD,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": DIM,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "init_std": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


@dataclass(frozen=True)
class Architecture:
    """A tiny model.

    Attributes:
        model: class in transformers.
        config: class of its configuration.
        arguments: of the configuration.
        blocks: path of the block list.
        attention: path in a block of the module whose output attention adds to the residual stream.
        mlp: the same of the feed-forward part.
        block_path: what the adapter's configuration has to say; None where structure tells.
        left, right: sides on which the model takes padding.
        image: its inputs hold an image.
    """

    model: str
    config: str
    arguments: dict[str, Any]
    blocks: str
    attention: str = "self_attn"
    mlp: str = "mlp"
    block_path: str | None = None
    left: bool = True
    right: bool = True
    image: bool = False
    nested: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)

    @property
    def causal(self) -> bool:
        return self.model.endswith(("ForCausalLM", "LMHeadModel")) or self.image

    @property
    def decoder(self) -> bool:
        """Whether the decoder of an encoder–decoder is edited."""
        return (self.block_path or "").startswith(("decoder", "model.decoder"))


def _llama_like(name: str, **more: Any) -> Architecture:
    arguments = {**LLAMA, **more}
    return Architecture(f"{name}ForCausalLM", f"{name}Config", arguments, "model.layers")


def _normed(architecture: Architecture) -> Architecture:
    """Set the modules of an architecture that normalises the output of attention and MLP."""
    return replace(
        architecture, attention="post_attention_layernorm", mlp="post_feedforward_layernorm"
    )


def _encoder(name: str, path: str, **more: Any) -> Architecture:
    return Architecture(
        f"{name}ForSequenceClassification", f"{name}Config", {**BERT, "num_labels": 3, **more},
        path, "attention.output.dense", "output.dense", left=False,
    )  # fmt: skip


ARCHITECTURES = {
    "llama": _llama_like("Llama"),
    "mistral": _llama_like("Mistral"),
    "qwen2": _llama_like("Qwen2"),
    "qwen3": _llama_like("Qwen3"),
    "gemma2": _normed(_llama_like("Gemma2", query_pre_attn_scalar=6)),
    "gemma3": _normed(
        Architecture(
            "Gemma3ForCausalLM", "Gemma3TextConfig", {**LLAMA, "query_pre_attn_scalar": 6},
            "model.layers",
        )
    ),
    "phi3": _llama_like("Phi3"),
    "olmo2": _normed(_llama_like("Olmo2")),
    "mixtral": _llama_like("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": Architecture(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16,
         "decoder_sparse_step": 2},
        "model.layers",
    ),
    "qwen3-moe": Architecture(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**EXPERTS, "num_experts": 4}, "model.layers"
    ),
    "deepseek-v3": Architecture(
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {**EXPERTS, "num_key_value_heads": 4, "head_dim": 4, "n_routed_experts": 4, "n_group": 1,
         "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
         "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6},
        "model.layers",
    ),
    "llama4": Architecture(
        "Llama4ForCausalLM", "Llama4TextConfig",
        {**LLAMA, "intermediate_size_mlp": 32, "num_local_experts": 2,
         "interleave_moe_layer_step": 2},
        "model.layers", mlp="feed_forward",
    ),
    "cohere2": _llama_like("Cohere2"),
    "glm4": Architecture(
        "Glm4ForCausalLM", "Glm4Config", LLAMA, "model.layers", "post_self_attn_layernorm",
        "post_mlp_layernorm",
    ),
    "gpt-oss": _llama_like("GptOss", num_local_experts=4, num_experts_per_tok=2),
    "gpt2": Architecture(
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": DIM, "n_layer": LAYERS, "n_head": 4, "n_positions": 64,
         "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
         **_NO_DROPOUT},
        # Left padding in generate() only, which numbers positions by the mask.
        "transformer.h", "attn", left=False,
    ),
    "opt": Architecture(
        "OPTForCausalLM", "OPTConfig",
        {**SHAPE, "ffn_dim": 32, "word_embed_proj_dim": DIM, "dropout": 0.0, "init_std": 0.2},
        "model.decoder.layers", "self_attn", "fc2",
    ),
    "gpt-neox": Architecture(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", SHAPE, "gpt_neox.layers", "attention",
        "mlp.dense_4h_to_h",
    ),
    "falcon": Architecture(
        "FalconForCausalLM", "FalconConfig", SHAPE, "transformer.h", "self_attention.dense",
        "mlp.dense_4h_to_h",
    ),
    "bloom": Architecture(
        "BloomForCausalLM", "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": DIM, "n_layer": LAYERS, "n_head": 4,
         "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2},
        "transformer.h", "self_attention.dense", "mlp.dense_4h_to_h",
    ),
    "mpt": Architecture(
        "MptForCausalLM", "MptConfig",
        {"vocab_size": VOCAB, "d_model": DIM, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64,
         "initializer_range": 0.2, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2},
        "transformer.blocks", "attn", "ffn.down_proj",
    ),
    "bert": _encoder("Bert", "bert.encoder.layer"),
    "roberta": _encoder("Roberta", "roberta.encoder.layer", max_position_embeddings=70),
    "deberta-v2": _encoder(
        "DebertaV2", "deberta.encoder.layer", relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_buckets=8,
    ),
    "modernbert": Architecture(
        "ModernBertForSequenceClassification", "ModernBertConfig",
        {**SHAPE, "num_labels": 3, "cls_token_id": 1, "sep_token_id": 2},
        "model.layers", "attn", left=False,
    ),
    "t5-encoder": Architecture(
        "T5ForConditionalGeneration", "T5Config", T5, "encoder.block",
        "layer.0.SelfAttention", "layer.1.DenseReluDense", block_path="encoder.block",
    ),
    "t5-decoder": Architecture(
        "T5ForConditionalGeneration", "T5Config", T5, "decoder.block",
        "layer.0.SelfAttention", "layer.2.DenseReluDense", block_path="decoder.block",
    ),
    "t5-encoder-only": Architecture(
        "T5EncoderModel", "T5Config", T5, "encoder.block",
        "layer.0.SelfAttention", "layer.1.DenseReluDense",
    ),
    "bart-encoder": Architecture(
        "BartForConditionalGeneration", "BartConfig", BART, "model.encoder.layers",
        "self_attn", "fc2", block_path="model.encoder.layers", left=False,
    ),
    "bart-decoder": Architecture(
        "BartForConditionalGeneration", "BartConfig", BART, "model.decoder.layers",
        "self_attn", "fc2", block_path="model.decoder.layers", left=False,
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration", "LlavaConfig", {"image_token_index": IMAGE},
        "model.language_model.layers", image=True,
        nested={
            "text_config": ("LlamaConfig", LLAMA),
            "vision_config": (
                "CLIPVisionConfig",
                {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS,
                 "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
            ),
        },
    ),
}  # fmt: skip


def construct(architecture: Architecture) -> nn.Module:
    """Build the model, with equal weights each time."""
    nested = {
        key: getattr(transformers, kind)(**arguments)
        for key, (kind, arguments) in architecture.nested.items()
    }
    config = getattr(transformers, architecture.config)(**architecture.arguments, **nested)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, architecture.model)(config).eval()


@functools.cache
def _model(name: str) -> nn.Module:
    return construct(ARCHITECTURES[name])


def build(name: str) -> nn.Module:
    """Return a new copy of the model, with equal weights each time."""
    return copy.deepcopy(_model(name))


def config_of(name, component, **changes) -> ReftConfig:
    architecture = ARCHITECTURES[name]
    settings = {
        "rank": 2,
        "positions": "prompt" if architecture.decoder else "f2+l1",
        "component": component,
        "block_path": architecture.block_path,
    }
    return ReftConfig(**{**settings, **changes})


def wrapped(name, component, **changes):
    torch.manual_seed(3)
    return get_reft_model(build(name), config_of(name, component, **changes))


def call_of(name, ids, mask=None):
    """Return the arguments of a forward of these tokens."""
    architecture = ARCHITECTURES[name]
    given = {} if mask is None else {"attention_mask": mask}
    if architecture.decoder:
        if mask is not None:
            given = {"decoder_attention_mask": mask}
        source = tokens(1, 5, seed=70).expand(len(ids), -1)
        return {"input_ids": source, "decoder_input_ids": ids, **given}
    if architecture.block_path is not None:  # the other side gets one token
        given["decoder_input_ids"] = torch.full((len(ids), 1), 2)
    if architecture.image:
        ids = ids.clone()
        ids[:, 1:5] = IMAGE
        torch.manual_seed(5)
        given["pixel_values"] = torch.randn(1, 3, 8, 8).expand(len(ids), -1, -1, -1)
    return {"input_ids": ids, **given}
