"""Fixtures of the model wrapper's tests."""

from __future__ import annotations

from word_llama import (
    _trained_llama,
    color_records,
    folders,
    make_trainer,
    place,
    reft,
    word_llama,
    word_tokenizer,
)

__all__ = [
    "_trained_llama",
    "color_records",
    "folders",
    "make_trainer",
    "place",
    "reft",
    "word_llama",
    "word_tokenizer",
]
