"""One prompt and one answer an example.

An edit lies at the ends of one prompt, and generation has one prompt at a time: a chat's next turn
is generated from all that was said before it. So each turn that an assistant is taught is an
example of its own, and an example with several answers is refused: in training its edits would be
at the first of them, in generation at each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer

from reft.model.prompts import IGNORED
from reft.model.reft_model import ReftModel

_WHAT_TO_DO = (
    "make each answer an example, with all that stands before it as its prompt, or give "
    "prompt_lengths or edit_positions"
)

#: Columns of tokenised examples that are 1 where a token is a target.
MASKS = ("assistant_masks", "completion_mask")


def counts_from_prompts(model: ReftModel) -> bool:
    """Whether the active adapter edits where a prompt lies that labels tell."""
    registry = model._registry
    if registry.active is None or not registry.causal or registry.sites.side == "decoder":
        return False
    return registry.adapter(registry.active).config.parsed_positions.kind in ("ends", "prompt")


def one_answer_each(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Conversations as examples of one prompt and one answer.

    An answer is what the assistant says until somebody else speaks; its prompt is every message
    before it, earlier answers too. A conversation of K answers becomes K examples; what follows
    the last answer is dropped, and what an assistant says first of all is never an answer.

    Args:
        rows: columns of a dataset, ``messages``, or ``prompt`` and ``completion``, of which only
            the second holds answers. The others go with each example.

    Returns:
        Columns ``prompt``, ``completion`` and the others.

    Raises:
        ValueError: no conversation has an answer.
    """
    name = "messages" if "messages" in rows else "completion"
    others = [column for column in rows if column not in ("messages", "prompt", "completion")]
    made: dict[str, list[Any]] = {column: [] for column in ("prompt", "completion", *others)}
    for at, messages in enumerate(rows[name]):
        before = list(rows["prompt"][at]) if name == "completion" else []
        said = [*before, *messages]
        for begin, end in answers(said, len(before)):
            made["prompt"].append(said[:begin])
            made["completion"].append(said[begin:end])
            for other in others:
                made[other].append(rows[other][at])
    if not made["prompt"]:
        roles = sorted({str(said.get("role")) for messages in rows[name] for said in messages})
        raise ValueError(
            f'{name} must hold answers, messages of the role "assistant" behind another message; '
            f"got the roles {roles} alone"
        )
    return made


def answers(messages: Sequence[Mapping[str, Any]], start: int = 0) -> list[tuple[int, int]]:
    """[begin, end) of each answer from message ``start`` on; see :func:`one_answer_each`."""
    speaks = [message.get("role") == "assistant" for message in messages]
    opening = next((at for at, speaks_now in enumerate(speaks) if not speaks_now), len(messages))
    turns: list[tuple[int, int]] = []
    for at in range(start or opening, len(messages)):
        if speaks[at] and turns and turns[-1][1] == at:
            turns[-1] = (turns[-1][0], at + 1)
        elif speaks[at]:
            turns.append((at, at + 1))
    return turns


def check_one_answer(example: Mapping[str, Any], columns: Sequence[str]) -> bool:
    """True, for datasets' ``filter``.

    Raises:
        ValueError: one of these columns holds more messages than one answer.
    """
    for name in columns:
        messages = example.get(name)
        roles = [said.get("role") for said in messages] if isinstance(messages, list) else []
        if any(role != "assistant" for role in roles):
            raise ValueError(
                f"{name} must be one answer of the assistant, for edits are at the ends of the one "
                f"prompt before it; got messages of the roles {roles}: {_WHAT_TO_DO}"
            )
    return True


def check_targets(dataset: Any, columns: Sequence[str]) -> None:
    """Check all examples of a tokenised ``datasets.Dataset``, without making Python lists of it.

    Args:
        columns: ``labels``, or masks of which all are 1 where a token is a target.

    Raises:
        ValueError: an example with several answers.
    """
    import pyarrow.compute as pc

    first = 0
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(1000):
        lengths = pc.list_value_length(table[columns[0]]).to_numpy()
        targets = np.ones(int(lengths.sum()), dtype=bool)
        for name in columns:
            values = pc.list_flatten(table[name]).to_numpy()
            targets &= values != IGNORED if name == "labels" else values == 1
        row = np.repeat(np.arange(len(lengths)), lengths)
        begins = targets.copy()
        begins[1:] &= ~targets[:-1] | (row[1:] != row[:-1])
        count = np.bincount(row[begins], minlength=len(lengths))
        if (count > 1).any():
            at = int((count > 1).argmax())
            raise ValueError(_several(f"example {first + at}", int(count[at])))
        first += len(lengths)


def check_batch(batch: Any) -> None:
    """Check a batch that a collator made, on the host.

    Raises:
        ValueError: a sequence with several answers, and nothing that says where its prompt ends.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.device.type != "cpu":
        return
    if batch.get("prompt_lengths") is not None or batch.get("edit_positions") is not None:
        return
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.shape != labels.shape:
        return
    first = torch.zeros_like(labels, dtype=torch.bool)
    first[:, :1] = True
    if batch.get("cu_seq_lens_q") is not None:
        bounds = batch["cu_seq_lens_q"][:-1].long()
        first.view(-1)[bounds[bounds < first.numel()]] = True
    elif mask is None and isinstance(batch.get("position_ids"), Tensor):
        first[:, 1:] |= batch["position_ids"].diff(dim=1) != 1
    attended = torch.ones_like(first) if mask is None or mask.ndim != 2 else mask.bool()
    sequence = first.view(-1).cumsum(0)[attended.view(-1)]
    targets = (labels != IGNORED).view(-1)[attended.view(-1)]
    begins = targets.clone()
    begins[1:] &= ~targets[:-1] | (sequence[1:] != sequence[:-1])
    count = sequence[begins].bincount()
    if count.numel() and int(count.max()) > 1:
        at = int(count.argmax())
        raise ValueError(_several(f"sequence {at - 1} of a batch", int(count[at])))


def _several(what: str, count: int) -> str:
    return (
        f"labels must be one answer behind one prompt, which the adapter edits; {what} has {count} "
        f"runs of labels that are not {IGNORED}: {_WHAT_TO_DO}"
    )


class OneAnswer:
    """A collator whose batches are checked with :func:`check_batch`, where they are made: on the
    host, before they go to a device."""

    def __init__(self, collate: Callable[..., Any]) -> None:
        self.collate = collate

    def __call__(self, features: Any) -> Any:
        batch = self.collate(features)
        check_batch(batch)
        return batch


class ChecksAnswers(Trainer):
    """A Trainer that refuses sequences with several answers."""

    def _reft_model(self) -> ReftModel:
        raise NotImplementedError

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        plain = self.data_collator
        if counts_from_prompts(self._reft_model()):
            self._set_signature_columns_if_needed()  # which may ask the collator
            self.data_collator = OneAnswer(plain)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = plain
