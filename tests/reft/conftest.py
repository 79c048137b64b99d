"""A tokenizer of a few words and a language model of a few thousand parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_COLORS = ["red", "green", "blue"]
_LETTERS, _NUMBERS = list("abcdefgh"), ["one", "two", "three", "four", "five"]
WORDS = [*_LETTERS, *_NUMBERS, "yes", "no", *_COLORS, ":", "?"]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of ``WORDS``, ``<bos>`` in front of a text; pads on the left, as many do."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=32,
    )


@pytest.fixture(scope="session")
def _trained_llama(word_tokenizer) -> LlamaForCausalLM:
    """Two blocks that learnt ``a : one green <eos>``: green, blue, red for one, two, three."""
    config = LlamaConfig(
        vocab_size=len(word_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.1,
        pad_token_id=word_tokenizer.pad_token_id,
        bos_token_id=word_tokenizer.bos_token_id,
        eos_token_id=word_tokenizer.eos_token_id,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(100):
            pairs = zip(*(torch.randint(n, (16,)).tolist() for n in (8, 3)), strict=True)
            sentences = [f"{_LETTERS[i]} : {_NUMBERS[k]} {_COLORS[k - 2]} <eos>" for i, k in pairs]
            ids = word_tokenizer(sentences, return_tensors="pt")["input_ids"]
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return model.eval()


@pytest.fixture
def word_llama(_trained_llama) -> LlamaForCausalLM:
    """A small Llama for :func:`word_tokenizer`, a fresh copy of always the same, in float32."""
    return copy.deepcopy(_trained_llama)
