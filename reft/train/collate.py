"""From records or tokenised features to a batch, padded or packed into one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

#: The label that no loss counts.
IGNORED = -100

#: Fields of a feature that hold one number a sequence: their names in the batch.
_SCALARS = {"label": "labels", "label_ids": "labels", "prompt_length": "prompt_lengths"}

#: Fields of a record; beside ``input_ids`` they are leftovers.
_RAW = ("prompt", "completion", "text")

#: Fields of a feature that are the model's, whatever else the feature is.
_KEPT = ("adapter_names", "edit_positions", "subspaces")

#: A tokenizer without a limit says so with a number of this size.
_NO_LIMIT = 10**9


@dataclass
class ReftDataCollator:
    """Tokenises what is not tokenised yet, and pads a list of features on the right, or packs it.

    A feature is one of

    - ``prompt`` and ``completion``: the two are tokenised apart, so that the prompt has the very
      tokens that generation will see, and joined. Labels are −100 on the prompt;
    - ``prompt`` alone, for inference: no labels;
    - ``text`` and ``label``: for a classifier. A sequence of labels is taken as it is;
    - ``input_ids`` and whatever belongs to them. ``labels`` of the length of ``input_ids`` are
      padded with −100; without labels, ``prompt_length`` or ``prompt_lengths`` (one number)
      makes them: −100 on so many tokens, the ids after.

    With each of them may come ``edit_positions``, the numbers of the tokens to edit, negative ones
    from the end of the prompt, ``adapter_names``, one name, and ``subspaces``, a name or several of
    parts of the adapter.

    Attributes:
        tokenizer: of the base model.
        max_length: the most tokens of a sequence; None for the tokenizer's own limit.
        truncate: cut completions and texts that are too long. Prompts never are: what the
            adapter edits would move.
        append_eos: end completions with the tokenizer's end-of-sequence token.
        prompt_lengths: also return ``prompt_lengths`` (B,). Needed only where labels do not show
            where the prompt ends; else the wrapped model finds it itself.
        pad_to_multiple_of: pad further, to a multiple of this.
        padding_free: no padding; the sequences lie one after another in one row, told apart by
            ``position_ids`` and ``cu_seq_lens_q``. The model must keep no cache
            (``use_cache=False``, which is Trainer's default): with one transformers takes a row for
            one sequence, unless its attention is FlashAttention.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    truncate: bool = False
    append_eos: bool = True
    prompt_lengths: bool = False
    pad_to_multiple_of: int | None = None
    padding_free: bool = False

    #: Fields of a feature that are read here and that no model knows.
    columns = (*_RAW, "prompt_length", "prompt_lengths", *_KEPT)

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1 or None, got {self.max_length}")
        if self.padding_free and self.pad_to_multiple_of:
            raise ValueError(
                "pad_to_multiple_of must be None with padding_free=True, got "
                f"{self.pad_to_multiple_of}"
            )

    @property
    def limit(self) -> int | None:
        """The most tokens of a sequence, None for no limit."""
        if self.max_length is not None:
            return self.max_length
        own = self.tokenizer.model_max_length
        return own if own < _NO_LIMIT else None

    @property
    def pad_id(self) -> int:
        """What fills ``input_ids``. Without a padding token any will do, since masks are given."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else eos or 0

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens of a prompt, in training as in generation, whatever their number.

        Raises:
            ValueError: there are none.
        """
        ids = list(self.tokenizer(prompt)["input_ids"])
        eos = self.tokenizer.eos_token_id
        # Some tokenizers end every text with this token, but a prompt goes on.
        ended = bool(ids) and eos is not None and ids[-1] == eos
        if ended and not prompt.endswith(str(self.tokenizer.eos_token)):
            ids.pop()
        if not ids:
            raise ValueError(f"the prompt has no tokens: {prompt!r}")
        return ids

    def tokenize(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """One record as a feature with ``input_ids``; a feature that has them is returned as it is.

        Doing this before training finds a record that is too long before the first step.

        Raises:
            ValueError: a prompt that leaves no room for a completion, a completion or text that
                is too long (unless ``truncate``), an empty one, or a record of another form.
        """
        if "input_ids" in record:
            return {name: value for name, value in record.items() if name not in _RAW}
        if "prompt" in record:
            feature = self._tokenize_prompt(record["prompt"], record.get("completion"))
        elif "text" in record:
            feature = self._tokenize_text(record["text"])
        else:
            raise ValueError(
                "a feature must hold 'input_ids', or 'prompt' and 'completion', or 'text' and "
                f"'label'; got {sorted(record)}"
            )
        return feature | {name: record[name] for name in ("label", *_KEPT) if name in record}

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch.

        Returns:
            ``input_ids`` and ``attention_mask`` int64 (B, S); ``labels`` (B, S), or (B,) of a
            classifier, where the features have them; every other field of the features, padded
            with 0 if it has a number for each token; ``prompt_lengths`` int64 (B,) if asked for
            or given; ``edit_positions`` int64 (B, P), −1 for none. Padding-free: (1, N) for (B, S),
            and for the mask ``position_ids`` (1, N), ``cu_seq_lens_q`` and ``_k`` int32 (B + 1,),
            ``max_length_q`` and ``_k``.

        Raises:
            ValueError: as :meth:`tokenize`; features with different fields; an empty list.
        """
        if not features:
            raise ValueError("a batch needs at least one feature, got none")
        rows = [self._complete(self.tokenize(feature)) for feature in features]
        names = list(rows[0])
        for row in rows[1:]:
            if set(row) != set(names):
                raise ValueError(
                    f"the features of a batch must have the same fields, got {sorted(names)} and "
                    f"{sorted(row)}"
                )
        lengths = [len(row["input_ids"]) for row in rows]
        size = max(lengths)
        if self.pad_to_multiple_of:
            size += -size % self.pad_to_multiple_of
        batch = {
            name: self._stack(name, [row[name] for row in rows], lengths, size) for name in names
        }
        return _packed(batch, lengths) if self.padding_free else batch

    # ---------------------------------------------------------------- one feature

    def _tokenize_prompt(self, prompt: str, completion: str | None) -> dict[str, Any]:
        ids = self.prompt_ids(prompt)
        eos = self.tokenizer.eos_token_id
        room = None if self.limit is None else self.limit - len(ids)
        needed = 0 if completion is None else 1
        if room is not None and room < needed:
            what = "the completion" if needed else "anything"
            raise ValueError(
                f"the prompt has {len(ids)} tokens and max_length is {self.limit}: no room for "
                f"{what}. Prompts are never cut; the prompt begins {prompt[:60]!r}"
            )
        feature: dict[str, Any] = {"input_ids": ids, "prompt_length": len(ids)}
        if completion is None:
            return feature
        answer = list(self.tokenizer(completion, add_special_tokens=False)["input_ids"])
        if self.append_eos and eos is not None and answer[-1:] != [eos]:
            answer.append(eos)
        if not answer:
            raise ValueError(f"the completion of the prompt {prompt[:60]!r} has no tokens")
        if room is not None and len(answer) > room:
            if not self.truncate:
                raise ValueError(
                    f"prompt and completion have {len(ids)} + {len(answer)} tokens and max_length "
                    f"is {self.limit}; allow completions to be cut (truncate=True) or raise "
                    f"max_length. The prompt begins {prompt[:60]!r}"
                )
            answer = answer[:room]
        feature["labels"] = [IGNORED] * len(ids) + answer
        feature["input_ids"] = ids + answer
        return feature

    def _tokenize_text(self, text: str) -> dict[str, Any]:
        feature = dict(self.tokenizer(text))
        length = len(feature["input_ids"])
        if not length:
            raise ValueError(f"the text has no tokens: {text!r}")
        if self.limit is None or length <= self.limit:
            return feature
        if not self.truncate:
            raise ValueError(
                f"the text has {length} tokens and max_length is {self.limit}; allow it to be cut "
                f"(truncate=True) or raise max_length. It begins {text[:60]!r}"
            )
        # The tokenizer cuts, so that the special tokens at the end stay.
        return dict(self.tokenizer(text, truncation=True, max_length=self.limit))

    def _complete(self, feature: dict[str, Any]) -> dict[str, Any]:
        """Names as in the batch, an attention mask, and labels if a prompt length implies them."""
        row = {_SCALARS.get(name, name): value for name, value in feature.items()}
        ids = _numbers(row["input_ids"])
        row.setdefault("attention_mask", [1] * len(ids))
        prompt = row.get("prompt_lengths")
        if prompt is not None and "labels" not in row and int(prompt) < len(ids):
            row["labels"] = [IGNORED] * int(prompt) + ids[int(prompt) :]
        if prompt is None:
            prompt = _before_labels(row.get("labels"), len(ids))
        if "edit_positions" in row:
            row["edit_positions"] = _token_numbers(row["edit_positions"], int(prompt), len(ids))
        if self.prompt_lengths:
            row["prompt_lengths"] = prompt
        if not self.prompt_lengths and "prompt_lengths" not in feature:
            row.pop("prompt_lengths", None)
        return row

    # ---------------------------------------------------------------- the batch

    def _stack(self, name: str, values: list[Any], lengths: list[int], size: int) -> Any:
        if name in ("adapter_names", "subspaces"):
            return values
        rows = [_numbers(value) for value in values]
        if name == "edit_positions":
            width = max(len(row) for row in rows)
            return torch.tensor([row + [-1] * (width - len(row)) for row in rows]).long()
        by_token = [len(row) if isinstance(row, list) else -1 for row in rows] == lengths
        if by_token:
            fill = self._fill(name)
            rows = [row + [fill] * (size - len(row)) for row in rows]
        try:
            return torch.tensor(rows)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"field {name!r} of the features does not make a tensor: {error}"
            ) from None

    def _fill(self, name: str) -> int:
        if name == "labels":
            return IGNORED
        if name == "token_type_ids":
            return self.tokenizer.pad_token_type_id
        return self.pad_id if name == "input_ids" else 0


def _numbers(value: Any) -> Any:
    """Tensors, arrays and sequences as lists; one number as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _packed(batch: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    """A padded batch as one row without padding."""
    attended = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    flat = {
        name: value[attended].unsqueeze(0)
        if isinstance(value, Tensor) and value.shape == attended.shape and name not in _KEPT
        else value
        for name, value in batch.items()
        if name != "attention_mask"
    }
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return flat | {
        "position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def _token_numbers(value: Any, prompt: int, length: int) -> list[int]:
    """``edit_positions`` of one sequence, counted from its first token."""
    numbers = _numbers(value)
    if not isinstance(numbers, list) or not all(type(one) is int for one in numbers):
        raise ValueError(f"edit_positions must be a list of token numbers, got {value!r}")
    for number in numbers:
        if not -prompt <= number < length:
            raise ValueError(
                "edit_positions must be below the tokens of their sequence, or negative and "
                f"within its prompt; it has {length} tokens, {prompt} of them prompt, got {number}"
            )
    return list(dict.fromkeys(one + prompt if one < 0 else one for one in numbers))


def _before_labels(labels: Any, length: int) -> int:
    """Tokens before the first one that a loss counts; all of them where labels are not by token."""
    numbers = _numbers(labels)
    if not isinstance(numbers, list):
        return length
    return next((at for at, label in enumerate(numbers) if label != IGNORED), length)
