"""Data collator: records or tokenised features to a batch, padded or packed into one row."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from reft.positions import IGNORED
from reft.train import tokenization
from reft.train.labels import (
    KINDS,
    as_numbers,
    check_kind,
    count_prompt_tokens,
    infer_kind,
    infer_kind_of_batch,
    next_token_labels,
)

#: Names of fields in the batch that differ from those in a feature.
_BATCH_NAMES = {"label": "labels", "label_ids": "labels", "prompt_length": "prompt_lengths"}

#: Fields of text; they are dropped from features that have ``input_ids``.
_TEXT_FIELDS = ("prompt", "completion", "text")

#: Fields that hold the labels of a classifier's record.
_LABEL_FIELDS = ("label", "label_ids", "labels")

#: Fields that are arguments of the wrapped model, in every kind of feature.
_MODEL_FIELDS = ("adapter_names", "edit_positions", "subspaces")

#: A tokenizer without a limit has a model_max_length of at least this number.
_NO_LIMIT = 10**9

#: How to make a prompt of a chat's messages, for errors.
_CHAT_PROMPT = (
    "prompt is tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"
)


@dataclass
class ReftDataCollator:
    """Tokenise records and pad them on the right, or pack them into one row.

    A feature is one of

    - ``prompt`` and ``completion``: both are tokenised separately, so that the prompt has the same
      tokens as in generation, and concatenated. Labels are −100 on the prompt;
    - ``prompt`` alone, for inference: no labels;
    - ``text`` and ``label``, for a classifier: one label, several, or one per token;
    - ``input_ids`` and further fields of a tokenizer. Without ``labels``, ``prompt_length`` or
      ``prompt_lengths`` (one number) defines them: −100 on that many tokens, the ids after.

    A prompt or text that begins with the tokenizer's start token, as a rendered chat template does,
    gets no second one.

    Each feature may also have ``edit_positions``, the numbers of the tokens to edit, with negative
    numbers counted from the end of the prompt; ``adapter_names``, one name; and ``subspaces``, one
    or several names of subspaces of the adapter.

    If labels are next tokens, the prompt is everything before the first label that is not −100.
    With other labels, or none, it is the whole text. Masked tokens are never counted.

    Attributes:
        tokenizer: the base model's tokenizer.
        max_length: the maximum number of tokens of a sequence; None for the tokenizer's limit.
        truncate: truncate completions and texts that are too long. Prompts are never truncated,
            because the edited tokens would change.
        append_eos: end completions with the tokenizer's end-of-sequence token, at which
            :func:`reft.train.evaluate.generate_completions` stops.
        prompt_lengths: also return ``prompt_lengths`` (B,). This is needed only if labels do not
            show where the prompt ends; otherwise the wrapped model derives it.
        pad_to_multiple_of: pad further, to a multiple of this.
        label_kind: the kind of labels that are lists. "next": the ids of the tokens, which a
            language model predicts. "token": a class of each token. "sequence": several labels of
            the whole text. The first two are padded with −100, the third is not padded. None infers
            the kind by :func:`reft.train.labels.infer_kind`: one integer per token is "next" if
            each is −100 or the id of its token, otherwise "token"; anything else is "sequence".
        padding_free: concatenate the sequences in one row without padding, separated by
            ``position_ids`` and ``cu_seq_lens_q``. The model must not use a cache
            (``use_cache=False``, which is Trainer's default): with a cache, transformers reads the
            row as one sequence, unless its attention is FlashAttention.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    truncate: bool = False
    append_eos: bool = True
    prompt_lengths: bool = False
    pad_to_multiple_of: int | None = None
    padding_free: bool = False
    label_kind: str | None = None

    #: Fields of a feature that the collator reads besides arguments of the base model.
    columns = (*_TEXT_FIELDS, "prompt_length", "prompt_lengths", *_MODEL_FIELDS)

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1 or None, got {self.max_length}")
        if self.padding_free and self.pad_to_multiple_of:
            raise ValueError(
                "pad_to_multiple_of must be None with padding_free=True, got "
                f"{self.pad_to_multiple_of}"
            )
        if self.label_kind not in (None, *KINDS):
            raise ValueError(
                f"label_kind must be None or one of {', '.join(KINDS)}, got {self.label_kind!r}"
            )

    @property
    def limit(self) -> int | None:
        """The maximum number of tokens of a sequence, None for no limit."""
        if self.max_length is not None:
            return self.max_length
        limit = self.tokenizer.model_max_length
        return limit if limit < _NO_LIMIT else None

    @property
    def pad_id(self) -> int:
        """The token id that pads ``input_ids``. Without a padding token any id works, because the
        padding is masked."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else eos or 0

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt, untruncated, as in training and generation.

        Raises:
            ValueError: the prompt has no tokens.
        """
        return tokenization.prompt_ids(self.tokenizer, prompt)

    def tokenize(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Convert a record to a feature with ``input_ids``; only drop text from tokenised features.

        Tokenising the data before training finds records that are too long before the first step.

        Raises:
            ValueError: a prompt that leaves no room for a completion; a completion or text that is
                too long (unless ``truncate``) or empty; or a record without the required fields.
        """
        for name in ("messages", "prompt", "text"):
            if "input_ids" not in record and not isinstance(record.get(name, ""), str):
                raise ValueError(
                    f"field {name!r} of a record must be text, got {type(record[name]).__name__}: "
                    f"for a chat, {_CHAT_PROMPT} and completion the answer"
                )
        if "input_ids" in record:
            return {name: value for name, value in record.items() if name not in _TEXT_FIELDS}
        if "prompt" in record:
            completion = record.get("completion")
            feature = self._tokenize_prompt(record["prompt"], completion)
            labels = _LABEL_FIELDS if completion is None else ()
        elif "text" in record:
            feature, labels = self._tokenize_text(record), _LABEL_FIELDS
        else:
            raise ValueError(
                "a feature must hold 'input_ids', or 'prompt' and 'completion', or 'text' and "
                f"'label'; got {sorted(record)}"
            )
        fields = (*labels, *_MODEL_FIELDS)
        return feature | {name: record[name] for name in fields if name in record}

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of some features.

        Returns:
            ``input_ids`` and ``attention_mask`` int64 (B, S); ``labels`` (B, S), or (B,) of a
            classifier, if the features have labels; every other field of the features, padded with
            0 if it has a number for each token; ``prompt_lengths`` int64 (B,) if requested or
            given; ``edit_positions`` int64 (B, P), −1 for none. With ``padding_free``, (1, N)
            replaces (B, S), and ``position_ids`` (1, N), ``cu_seq_lens_q`` and ``cu_seq_lens_k``
            int32 (B + 1,), ``max_length_q`` and ``max_length_k`` replace the mask.

        Raises:
            TypeError: a feature that is not a mapping.
            ValueError: see :meth:`tokenize`; features with different fields; or an empty list.
        """
        if not features:
            raise ValueError("a batch needs at least one feature, got none")
        for feature in features:
            if not isinstance(feature, Mapping):
                raise TypeError(
                    "a feature must be a mapping, such as {'prompt': …, 'completion': …}, got "
                    f"{type(feature).__name__}: for a chat, {_CHAT_PROMPT}"
                )
        rows = [_with_batch_names(self.tokenize(feature)) for feature in features]
        kind = self._label_kind_of([row for row in rows if "labels" in row])
        for row, feature in zip(rows, features, strict=True):
            self._resolve_prompt(row, kind, keep="prompt_lengths" in feature)
        for row in rows[1:]:
            if set(row) != set(rows[0]):
                raise ValueError(
                    f"the features of a batch must have the same fields, got {sorted(rows[0])} and "
                    f"{sorted(row)}"
                )
        lengths = [len(row["input_ids"]) for row in rows]
        size = max(lengths)
        if self.pad_to_multiple_of:
            size += -size % self.pad_to_multiple_of
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        by_token = {
            name for name, values in columns.items() if _is_by_token(name, values, lengths, kind)
        }
        batch = {
            name: self._stack(name, values, size if name in by_token else None)
            for name, values in columns.items()
        }
        return _packed(batch, by_token) if self.padding_free else batch

    # ---------------------------------------------------------------- one feature

    def _tokenize_prompt(self, prompt: str, completion: str | None) -> dict[str, Any]:
        ids = self.prompt_ids(prompt)
        room = None if self.limit is None else self.limit - len(ids)
        required = 0 if completion is None else 1
        if room is not None and room < required:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and max_length is {self.limit}: "
                f"{'no room for the completion' if required else 'too long'}. Prompts are never "
                f"truncated; the prompt begins {prompt[:60]!r}"
            )
        feature: dict[str, Any] = {"input_ids": ids, "prompt_length": len(ids)}
        if completion is None:
            return feature
        target_ids = tokenization.completion_ids(
            self.tokenizer, completion, append_eos=self.append_eos
        )
        if not target_ids:
            raise ValueError(f"the completion of the prompt {prompt[:60]!r} has no tokens")
        if room is not None and len(target_ids) > room:
            if not self.truncate:
                raise ValueError(
                    f"prompt and completion have {len(ids)} + {len(target_ids)} tokens and "
                    f"max_length is {self.limit}; allow truncation of completions (truncate=True) "
                    f"or raise max_length. The prompt begins {prompt[:60]!r}"
                )
            target_ids = target_ids[:room]
        feature["labels"] = [IGNORED] * len(ids) + target_ids
        feature["input_ids"] = ids + target_ids
        return feature

    def _tokenize_text(self, record: Mapping[str, Any]) -> dict[str, Any]:
        text = record["text"]
        feature = tokenization.encode_text(self.tokenizer, text)
        length = len(feature["input_ids"])
        if not length:
            raise ValueError(f"the text has no tokens: {text!r}")
        if self.limit is None or length <= self.limit:
            return feature
        if not self.truncate:
            raise ValueError(
                f"the text has {length} tokens and max_length is {self.limit}; allow truncation "
                f"(truncate=True) or raise max_length. It begins {text[:60]!r}"
            )
        labels = [as_numbers(record[name]) for name in _LABEL_FIELDS if name in record]
        if any(infer_kind(values, feature["input_ids"]) != "sequence" for values in labels):
            raise ValueError(
                f"the text has {length} tokens with one label per token and max_length is "
                f"{self.limit}: labels are not truncated, raise max_length or truncate text and "
                f"labels. It begins {text[:60]!r}"
            )
        return tokenization.cut_text(self.tokenizer, text, self.limit)

    # ---------------------------------------------------------------- the batch

    def _label_kind_of(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """Return which of :data:`reft.train.labels.KINDS` the labels are, None without labels."""
        if not rows:
            return None
        labels, ids = [row["labels"] for row in rows], [row["input_ids"] for row in rows]
        if self.label_kind is None or not any(isinstance(values, list) for values in labels):
            return infer_kind_of_batch(labels, ids)
        check_kind(self.label_kind, labels, ids)
        return self.label_kind

    def _resolve_prompt(self, row: dict[str, Any], kind: str | None, *, keep: bool) -> None:
        """Set ``prompt_lengths`` of a row if requested, and count its ``edit_positions`` from the
        first token."""
        mask = row["attention_mask"]
        prompt_length = row.get("prompt_lengths")
        if prompt_length is None:
            targets = row.get("labels") if kind == "next" else None
            prompt_length = count_prompt_tokens(targets, mask)
        if "edit_positions" in row:
            total = sum(map(bool, mask))
            row["edit_positions"] = _token_indices(row["edit_positions"], int(prompt_length), total)
        if self.prompt_lengths:
            row["prompt_lengths"] = prompt_length
        elif not keep:
            row.pop("prompt_lengths", None)

    def _stack(self, name: str, values: list[Any], size: int | None) -> Any:
        """Return the values of a field as a tensor, padded to ``size`` unless that is None."""
        if name in ("adapter_names", "subspaces"):
            return values
        if name == "edit_positions":
            width = max(len(row) for row in values)
            return torch.tensor([row + [-1] * (width - len(row)) for row in values]).long()
        if size is not None:
            padding = self._padding_of(name)
            values = [row + [_padding_like(row, padding)] * (size - len(row)) for row in values]
        try:
            return torch.tensor(values)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"field {name!r} of the features does not make a tensor: {error}"
            ) from None

    def _padding_of(self, name: str) -> int:
        if name == "labels":
            return IGNORED
        if name == "token_type_ids":
            return self.tokenizer.pad_token_type_id
        return self.pad_id if name == "input_ids" else 0


def _with_batch_names(feature: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the fields of a feature as in the batch, and add a missing attention mask and labels
    that follow from the prompt length."""
    row = {
        _BATCH_NAMES.get(name, name): value if name in _MODEL_FIELDS else as_numbers(value)
        for name, value in feature.items()
    }
    ids = row["input_ids"]
    mask = row.setdefault("attention_mask", [1] * len(ids))
    if len(mask) != len(ids):
        raise ValueError(
            "the attention_mask of a feature must have one entry per token, got "
            f"{len(mask)} for {len(ids)} tokens"
        )
    length = row.get("prompt_lengths")
    if length is not None and "labels" not in row and int(length) < sum(map(bool, mask)):
        row["labels"] = next_token_labels(ids, mask, int(length))
    return row


def _is_by_token(name: str, values: Sequence[Any], lengths: list[int], kind: str | None) -> bool:
    """Return whether the values of a field have an entry for each token."""
    if name == "labels":
        return kind in ("next", "token")
    if name in _MODEL_FIELDS:
        return False
    return [len(row) if isinstance(row, list) else -1 for row in values] == lengths


def _padding_like(row: list[Any], padding: int) -> Any:
    """Return padding in the shape of the entries of a row."""
    if not row or not isinstance(row[0], list):
        return padding
    return [_padding_like(row[0], padding)] * len(row[0])


def _packed(batch: dict[str, Any], by_token: Collection[str]) -> dict[str, Any]:
    """Concatenate the attended tokens of a padded batch in one row."""
    attended = batch["attention_mask"].bool()
    lengths = attended.sum(1).tolist()
    if 0 in lengths:
        raise ValueError(
            f"with padding_free=True a feature must have an attended token, got none in feature "
            f"{lengths.index(0)} of the batch"
        )
    flat = {
        name: value[attended].unsqueeze(0) if name in by_token else value
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


def _token_indices(value: Any, prompt_length: int, length: int) -> list[int]:
    """Return the ``edit_positions`` of one sequence, counted from its first token."""
    indices = as_numbers(value)
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise ValueError(f"edit_positions must be a list of token numbers, got {value!r}")
    for index in indices:
        if not -prompt_length <= index < length:
            raise ValueError(
                "edit_positions must be less than the number of tokens of their sequence, or "
                f"negative and within its prompt; it has {length} tokens, {prompt_length} of them "
                f"prompt, got {index}"
            )
    resolved = (index + prompt_length if index < 0 else index for index in indices)
    return list(dict.fromkeys(resolved))
