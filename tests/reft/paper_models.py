"""The paper's base models on the meta device: shapes without weights."""

from __future__ import annotations

import functools

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    RobertaConfig,
)


def _llama(hidden: int, inner: int, layers: int, heads: int, **more: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **{"vocab_size": 32000, **more},
    )


def _roberta(hidden: int, inner: int, layers: int, heads: int) -> RobertaConfig:
    return RobertaConfig(
        vocab_size=50265,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=1,
        num_labels=2,
    )


_SEVEN = (4096, 11008, 32, 32)

CONFIGS = {
    "LLaMA-7B": _llama(*_SEVEN),
    "LLaMA-13B": _llama(5120, 13824, 40, 40),
    "Llama-2 7B": _llama(*_SEVEN),
    "Llama-2-chat 7B": _llama(*_SEVEN),
    "Llama-3 8B": _llama(4096, 14336, 32, 32, vocab_size=128256, num_key_value_heads=8),
    "RoBERTa-base": _roberta(768, 3072, 12, 12),
    "RoBERTa-large": _roberta(1024, 4096, 24, 16),
}


def build(name: str) -> PreTrainedModel:
    """Build a base model of :data:`CONFIGS`."""
    config = CONFIGS[name]
    kind = (
        AutoModelForCausalLM
        if isinstance(config, LlamaConfig)
        else AutoModelForSequenceClassification
    )
    with torch.device("meta"):
        return kind.from_config(config)


#: The same, made once; whoever wraps it takes its adapter off again.
paper_model = functools.cache(build)
