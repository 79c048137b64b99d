"""Folders of tiny base models for the tests of presets; their tokenizers know every text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

WIDTH, POSITIONS = 16, 200


def byte_tokenizer(texts: Iterable[str], *, roberta: bool) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer with the special tokens of LLaMA or of RoBERTa."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if roberta else ["<unk>", "<s>", "</s>"]
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    pieces.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    number = pieces.token_to_id
    if roberta:
        pieces.post_processor = processors.RobertaProcessing(
            ("</s>", number("</s>")), ("<s>", number("<s>")), add_prefix_space=False
        )
    else:
        pieces.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", number("<s>"))]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if roberta:
        names |= {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
        names |= {"mask_token": "<mask>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, model_max_length=POSITIONS, padding_side="right", **names
    )


def save_llama(folder: Path, texts: Iterable[str], layers: int) -> Path:
    """Save a LLaMA without a padding token, as the published ones."""
    tokenizer = byte_tokenizer(texts, roberta=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return _save(LlamaForCausalLM, config, tokenizer, folder)


def save_roberta(folder: Path, texts: Iterable[str]) -> Path:
    """Save a RoBERTa of two blocks without a classifier."""
    tokenizer = byte_tokenizer(texts, roberta=True)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS + 2,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _save(RobertaForMaskedLM, config, tokenizer, folder)


def _save(kind: type, config: object, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)  # type: ignore[call-arg]
    tokenizer.save_pretrained(folder)
    return folder
