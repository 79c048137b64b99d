"""From records or tokenised features to a batch, padded or packed into one row."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from reft.train import tokenization
from reft.train.labels import (
    IGNORED,
    KINDS,
    as_numbers,
    check_kind,
    kind_of,
    kind_of_batch,
    next_labels,
    tokens_before,
)

#: Fields of a feature that hold one number a sequence: their names in the batch.
_SCALARS = {"label": "labels", "label_ids": "labels", "prompt_length": "prompt_lengths"}

#: Fields of a record; beside ``input_ids`` they are leftovers.
_RAW = ("prompt", "completion", "text")

#: Names of what a classifier's record is labelled with.
_LABELS = ("label", "label_ids", "labels")

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
    - ``text`` and ``label``: for a classifier, one label, several, or one a token;
    - ``input_ids`` and whatever belongs to them. Without ``labels``, ``prompt_length`` or
      ``prompt_lengths`` (one number) makes them: −100 on so many tokens, the ids after.

    A prompt or text that begins with the tokenizer's start token, as one that a chat template has
    rendered does, gets no second one.

    With each of them may come ``edit_positions``, the numbers of the tokens to edit, negative ones
    from the end of the prompt, ``adapter_names``, one name, and ``subspaces``, a name or several of
    parts of the adapter.

    The prompt of labels that are next tokens is what stands before the first that is not −100; with
    any other labels, or none, it is the whole text. Tokens that an ``attention_mask`` leaves out
    count nowhere.

    Attributes:
        tokenizer: of the base model.
        max_length: the most tokens of a sequence; None for the tokenizer's own limit.
        truncate: cut completions and texts that are too long. Prompts never are: what the
            adapter edits would move.
        append_eos: end completions with the tokenizer's end-of-sequence token. It is what
            :func:`reft.train.evaluate.generate_completions` stops at.
        prompt_lengths: also return ``prompt_lengths`` (B,). Needed only where labels do not show
            where the prompt ends; else the wrapped model finds it itself.
        pad_to_multiple_of: pad further, to a multiple of this.
        label_kind: what labels that are lists are: "next", the ids of the tokens themselves, which
            a language model is to predict; "token", a class of each token; "sequence", several of
            the whole text. The first two are padded with −100, the third never. None tells them
            by :func:`reft.train.labels.kind_of`: one a token and each −100 or its token's own id
            are next tokens, other whole numbers, one a token, are classes, and the rest several.
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
    label_kind: str | None = None

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
        if self.label_kind not in (None, *KINDS):
            raise ValueError(
                f"label_kind must be None or one of {', '.join(KINDS)}, got {self.label_kind!r}"
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
        return tokenization.prompt_ids(self.tokenizer, prompt)

    def tokenize(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """One record as a feature with ``input_ids``; a feature that has them is returned as it is.

        Doing this before training finds a record that is too long before the first step.

        Raises:
            ValueError: a prompt that leaves no room for a completion, a completion or text that
                is too long (unless ``truncate``), an empty one, or a record of another form.
        """
        for name in ("messages", "prompt", "text"):
            if "input_ids" not in record and not isinstance(record.get(name, ""), str):
                raise ValueError(
                    f"field {name!r} of a record must be text, got {type(record[name]).__name__}: "
                    "of a chat, prompt is tokenizer.apply_chat_template(messages, tokenize=False, "
                    "add_generation_prompt=True) and completion the answer"
                )
        if "input_ids" in record:
            return {name: value for name, value in record.items() if name not in _RAW}
        if "prompt" in record:
            completion = record.get("completion")
            feature = self._tokenize_prompt(record["prompt"], completion)
            labels = _LABELS if completion is None else ()
        elif "text" in record:
            feature, labels = self._tokenize_text(record), _LABELS
        else:
            raise ValueError(
                "a feature must hold 'input_ids', or 'prompt' and 'completion', or 'text' and "
                f"'label'; got {sorted(record)}"
            )
        return feature | {name: record[name] for name in (*labels, *_KEPT) if name in record}

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
            TypeError: a feature that is no mapping of fields.
            ValueError: as :meth:`tokenize`; features with different fields; an empty list.
        """
        if not features:
            raise ValueError("a batch needs at least one feature, got none")
        for feature in features:
            if not isinstance(feature, Mapping):
                raise TypeError(
                    "a feature must be a mapping, such as {'prompt': …, 'completion': …}, got "
                    f"{type(feature).__name__}: of a chat, prompt is "
                    "tokenizer.apply_chat_template(messages, tokenize=False, "
                    "add_generation_prompt=True)"
                )
        rows = [_complete(self.tokenize(feature)) for feature in features]
        kind = self._kind([row for row in rows if "labels" in row])
        for row, feature in zip(rows, features, strict=True):
            self._count(row, kind, keep="prompt_lengths" in feature)
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
        answer = tokenization.completion_ids(self.tokenizer, completion, append_eos=self.append_eos)
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
                f"the text has {length} tokens and max_length is {self.limit}; allow it to be cut "
                f"(truncate=True) or raise max_length. It begins {text[:60]!r}"
            )
        given = [as_numbers(record[name]) for name in _LABELS if name in record]
        if any(kind_of(one, feature["input_ids"]) != "sequence" for one in given):
            raise ValueError(
                f"the text has {length} tokens, one label a token, and max_length is {self.limit}: "
                f"labels are not cut, raise max_length or cut both. It begins {text[:60]!r}"
            )
        return tokenization.cut_text(self.tokenizer, text, self.limit)

    # ---------------------------------------------------------------- the batch

    def _kind(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """Of :data:`reft.train.labels.KINDS` that of the labels of rows, None if there are none."""
        if not rows:
            return None
        labels, ids = [row["labels"] for row in rows], [row["input_ids"] for row in rows]
        if self.label_kind is None or not any(isinstance(one, list) for one in labels):
            return kind_of_batch(labels, ids)
        check_kind(self.label_kind, labels, ids)
        return self.label_kind

    def _count(self, row: dict[str, Any], kind: str | None, *, keep: bool) -> None:
        """Count the prompt of a row, and its ``edit_positions`` from its first token."""
        mask = row["attention_mask"]
        prompt = row.get("prompt_lengths")
        if prompt is None:
            targets = row.get("labels") if kind == "next" else None
            prompt = tokens_before(targets, mask)
        if "edit_positions" in row:
            total = sum(map(bool, mask))
            row["edit_positions"] = _token_numbers(row["edit_positions"], int(prompt), total)
        if self.prompt_lengths:
            row["prompt_lengths"] = prompt
        elif not keep:
            row.pop("prompt_lengths", None)

    def _stack(self, name: str, values: list[Any], size: int | None) -> Any:
        """The values of a field as a tensor, those that are by token padded to ``size``."""
        if name in ("adapter_names", "subspaces"):
            return values
        if name == "edit_positions":
            width = max(len(row) for row in values)
            return torch.tensor([row + [-1] * (width - len(row)) for row in values]).long()
        if size is not None:
            fill = self._fill(name)
            values = [row + [_blank(row, fill)] * (size - len(row)) for row in values]
        try:
            return torch.tensor(values)
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


def _complete(feature: Mapping[str, Any]) -> dict[str, Any]:
    """Names as in the batch, an attention mask, and labels if a prompt length implies them."""
    row = {
        _SCALARS.get(name, name): value if name in _KEPT else as_numbers(value)
        for name, value in feature.items()
    }
    ids = row["input_ids"]
    mask = row.setdefault("attention_mask", [1] * len(ids))
    if len(mask) != len(ids):
        raise ValueError(
            "the attention_mask of a feature must have one entry a token, got "
            f"{len(mask)} for {len(ids)} tokens"
        )
    prompt = row.get("prompt_lengths")
    if prompt is not None and "labels" not in row and int(prompt) < sum(map(bool, mask)):
        row["labels"] = next_labels(ids, mask, int(prompt))
    return row


def _is_by_token(name: str, values: Sequence[Any], lengths: list[int], kind: str | None) -> bool:
    """Whether the values of a field have an entry for each token."""
    if name == "labels":
        return kind in ("next", "token")
    if name in _KEPT:
        return False
    return [len(row) if isinstance(row, list) else -1 for row in values] == lengths


def _blank(row: list[Any], fill: int) -> Any:
    """What fills a row up, of the shape of its entries."""
    return [_blank(row[0], fill)] * len(row[0]) if row and isinstance(row[0], list) else fill


def _packed(batch: dict[str, Any], by_token: Collection[str]) -> dict[str, Any]:
    """A padded batch as one row without padding, and without what its mask leaves out."""
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


def _token_numbers(value: Any, prompt: int, length: int) -> list[int]:
    """``edit_positions`` of one sequence, counted from its first token."""
    numbers = as_numbers(value)
    if not isinstance(numbers, list) or not all(type(one) is int for one in numbers):
        raise ValueError(f"edit_positions must be a list of token numbers, got {value!r}")
    for number in numbers:
        if not -prompt <= number < length:
            raise ValueError(
                "edit_positions must be below the tokens of their sequence, or negative and "
                f"within its prompt; it has {length} tokens, {prompt} of them prompt, got {number}"
            )
    return list(dict.fromkeys(one + prompt if one < 0 else one for one in numbers))
