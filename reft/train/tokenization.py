"""Tokenisation of prompts, completions and texts, shared by training, evaluation and generation."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from reft.model.end_tokens import listed_ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, Any]:
    """Tokenise a text without duplicating special tokens that the text already has at its ends.

    A text from a chat template begins with the start token, and the tokenizer would add a second
    one. This applies to every special token that the tokenizer adds at either end.

    Returns:
        ``input_ids`` and the tokenizer's other fields, lists of one entry per token.
    """
    encoded = dict(tokenizer(text))
    front, back = _count_duplicates(tokenizer, text, encoded["input_ids"])
    return _sliced(encoded, front, back)


def cut_text(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> dict[str, Any]:
    """Tokenise a text of more than ``limit`` tokens as :func:`encode_text` does, cut to ``limit``.

    The tokenizer truncates, so that the special tokens at the end remain.
    """
    front, _ = _count_duplicates(tokenizer, text, tokenizer(text)["input_ids"])
    encoded = dict(tokenizer(text, truncation=True, max_length=limit + front))
    return _sliced(encoded, front, 0)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the tokens of a prompt, untruncated, without an end token that the tokenizer adds.

    Raises:
        ValueError: the prompt has no tokens.
    """
    ids = list(encode_text(tokenizer, prompt)["input_ids"])
    eos = tokenizer.eos_token_id
    # Some tokenizers end every text with this token, but a prompt is continued.
    has_end = bool(ids) and eos is not None and ids[-1] == eos
    if has_end and not prompt.endswith(str(tokenizer.eos_token)):
        ids.pop()
    if not ids:
        raise ValueError(f"the prompt has no tokens: {prompt!r}")
    return ids


def completion_ids(
    tokenizer: PreTrainedTokenizerBase, completion: str, *, append_eos: bool
) -> list[int]:
    """Return the tokens of a completion; with ``append_eos`` they end with the end token."""
    ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if append_eos and eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    return ids


def end_ids(generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens at which generation stops: those of a generation config, which may be None,
    and the tokenizer's end token, with which training ends completions."""
    configured = getattr(generation_config, "eos_token_id", None)
    return list(dict.fromkeys([*listed_ids(configured), *listed_ids(tokenizer.eos_token_id)]))


def completion_text(
    tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], ends: Collection[int]
) -> str:
    """Decode generated tokens up to the first of ``ends``, without special tokens."""
    completion = list(itertools.takewhile(lambda token: token not in ends, ids))
    return str(tokenizer.decode(completion, skip_special_tokens=True))


def expected_text(
    tokenizer: PreTrainedTokenizerBase, completion: str, ends: Collection[int]
) -> str:
    """Return the text that :func:`completion_text` gives for the tokens of a completion.

    This is the completion itself unless its tokens include an end or a special token.
    """
    ids = completion_ids(tokenizer, completion, append_eos=False)
    special = {
        *tokenizer.all_special_ids,
        *(number for number, token in tokenizer.added_tokens_decoder.items() if token.special),
    }
    special.discard(tokenizer.unk_token_id)  # unknown tokens are text
    hidden = special.union(ends).intersection(ids)
    return completion_text(tokenizer, ids, ends) if hidden else completion


def _count_duplicates(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]
) -> tuple[int, int]:
    """Return how many tokens the tokenizer adds at the start and at the end that the text already
    has there."""
    ids = list(ids)
    if not ids or (ids.count(ids[0]) == 1 and ids.count(ids[-1]) == 1):
        return 0, 0  # no token occurs twice
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    length = len(plain)
    for front in range(len(ids) - length, -1, -1):
        if plain and ids[front : front + length] == plain:
            back = len(ids) - length - front
            # Compare the text as well: an unknown word may have the same token.
            starts = ids[0] == plain[0] and text.lstrip().startswith(_token_text(tokenizer, ids[0]))
            ends = ids[-1] == plain[-1] and text.rstrip().endswith(_token_text(tokenizer, ids[-1]))
            return front if starts else 0, back if ends else 0
    return 0, 0


def _token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    is_eos = token == tokenizer.eos_token_id
    return str(tokenizer.eos_token if is_eos else tokenizer.convert_ids_to_tokens(token))


def _sliced(encoded: dict[str, Any], front: int, back: int) -> dict[str, Any]:
    """Remove ``front`` and ``back`` tokens from the ends of every field."""
    end = len(encoded["input_ids"]) - back
    return {name: value[front:end] for name, value in encoded.items()}
