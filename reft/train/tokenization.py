"""How text becomes tokens and tokens text: one rule for training, evaluation and generation."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from reft.model.ends import listed_ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, Any]:
    """What the tokenizer makes of a text, without a start or an end that the text has itself.

    A text that a chat template has rendered begins with the start token as text; the tokenizer's
    own would be a second one. The same holds of whatever it adds at either end.

    Returns:
        ``input_ids`` and the tokenizer's other fields, lists of one entry a token.
    """
    encoded = dict(tokenizer(text))
    front, back = _repeated(tokenizer, text, encoded["input_ids"])
    return _sliced(encoded, front, back)


def cut_text(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> dict[str, Any]:
    """As :func:`encode_text` of a text that has more tokens than ``limit``, cut to so many.

    The tokenizer cuts, so that the special tokens at the end stay.
    """
    front, _ = _repeated(tokenizer, text, tokenizer(text)["input_ids"])
    encoded = dict(tokenizer(text, truncation=True, max_length=limit + front))
    return _sliced(encoded, front, 0)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of a prompt, whatever their number, without an end that the tokenizer adds.

    Raises:
        ValueError: there are none.
    """
    ids = list(encode_text(tokenizer, prompt)["input_ids"])
    eos = tokenizer.eos_token_id
    # Some tokenizers end every text with this token, but a prompt goes on.
    ended = bool(ids) and eos is not None and ids[-1] == eos
    if ended and not prompt.endswith(str(tokenizer.eos_token)):
        ids.pop()
    if not ids:
        raise ValueError(f"the prompt has no tokens: {prompt!r}")
    return ids


def completion_ids(
    tokenizer: PreTrainedTokenizerBase, completion: str, *, append_eos: bool
) -> list[int]:
    """The tokens of a completion, with ``append_eos`` ending in the tokenizer's end token."""
    ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if append_eos and eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    return ids


def end_ids(generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which generation stops: those of a generation config, which may be None, and
    the one that training teaches, which is the tokenizer's end token."""
    configured = getattr(generation_config, "eos_token_id", None)
    return list(dict.fromkeys([*listed_ids(configured), *listed_ids(tokenizer.eos_token_id)]))


def answer_text(
    tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], ends: Collection[int]
) -> str:
    """Generated tokens as text: up to the first of ``ends``, without special tokens."""
    answer: list[int] = []
    for one in ids:
        if one in ends:
            break
        answer.append(one)
    return str(tokenizer.decode(answer, skip_special_tokens=True))


def expected_text(
    tokenizer: PreTrainedTokenizerBase, completion: str, ends: Collection[int]
) -> str:
    """A completion as a model that generates its very tokens would show it.

    It is the completion itself unless an end or a special token is among them.
    """
    ids = completion_ids(tokenizer, completion, append_eos=False)
    special = {
        *tokenizer.all_special_ids,
        *(number for number, token in tokenizer.added_tokens_decoder.items() if token.special),
    }
    special.discard(tokenizer.unk_token_id)  # it stands for text
    hidden = special.union(ends).intersection(ids)
    return answer_text(tokenizer, ids, ends) if hidden else completion


def _repeated(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> tuple[int, int]:
    """How many tokens the tokenizer adds (in front, behind) that the text has there itself."""
    ids = list(ids)
    if not ids or (ids.count(ids[0]) == 1 and ids.count(ids[-1]) == 1):
        return 0, 0  # nothing is there twice
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    length = len(plain)
    for front in range(len(ids) - length, -1, -1):
        if plain and ids[front : front + length] == plain:
            back = len(ids) - length - front
            # The token must be there as text: an unknown word may have the same one.
            begun = ids[0] == plain[0] and text.lstrip().startswith(_token_text(tokenizer, ids[0]))
            ended = ids[-1] == plain[-1] and text.rstrip().endswith(_token_text(tokenizer, ids[-1]))
            return front if begun else 0, back if ended else 0
    return 0, 0


def _token_text(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    eos = number == tokenizer.eos_token_id
    return str(tokenizer.eos_token if eos else tokenizer.convert_ids_to_tokens(number))


def _sliced(encoded: dict[str, Any], front: int, back: int) -> dict[str, Any]:
    """Every field without so many tokens at its ends."""
    end = len(encoded["input_ids"]) - back
    return {name: value[front:end] for name, value in encoded.items()}
