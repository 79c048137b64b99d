"""Checks that a training example has one prompt and one answer.

An edit lies at the ends of one prompt, and generation has one prompt at a time: the next turn of a
chat is generated from the whole conversation before it. A sequence with several answers is
therefore refused. Training would edit at the first answer alone, generation at each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reft.model.reft_model import ReftModel
from reft.positions import IGNORED

_WHAT_TO_DO = (
    "make each answer an example, with everything before it as its prompt, or give "
    "prompt_lengths or edit_positions"
)


def edits_depend_on_prompt(model: ReftModel) -> bool:
    """Return whether the active adapter edits positions that depend on where a prompt ends, and
    the labels determine that."""
    registry = model._registry
    if registry.active is None or not registry.causal or registry.blocks.side == "decoder":
        return False
    return registry.adapter(registry.active).config.parsed_positions.kind in ("ends", "prompt")


def check_single_answer(example: Mapping[str, Any], columns: Sequence[str]) -> bool:
    """Check the messages of an example, as a predicate for ``datasets.Dataset.filter``.

    Args:
        example: a row of the data set.
        columns: the columns that hold an answer.

    Returns:
        True.

    Raises:
        ValueError: a column holds a message of somebody else than the assistant.
    """
    for name in columns:
        messages = example.get(name)
        roles = [message.get("role") for message in messages] if isinstance(messages, list) else []
        if any(role != "assistant" for role in roles):
            raise ValueError(
                f"{name} must be one answer of the assistant, because edits are at the ends of the "
                f"one prompt before it; got messages of the roles {roles}: {_WHAT_TO_DO}"
            )
    return True


def check_tokenized_dataset(dataset: Any, columns: Sequence[str]) -> None:
    """Check all examples of a tokenised ``datasets.Dataset`` without converting them to Python.

    Args:
        dataset: the data set, whose rows hold ``columns``.
        columns: ``labels``, or masks; a token is a target where all masks are 1.

    Raises:
        ValueError: an example with several answers.
    """
    import pyarrow.compute as pc

    offset = 0
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
            index = int((count > 1).argmax())
            raise ValueError(_several_answers(f"example {offset + index}", int(count[index])))
        offset += len(lengths)


def check_batch(batch: Any) -> None:
    """Check a batch from a collator, on the host.

    Raises:
        ValueError: a sequence with several answers, and neither ``prompt_lengths`` nor
            ``edit_positions``.
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
        index = int(count.argmax())
        raise ValueError(_several_answers(f"sequence {index - 1} of a batch", int(count[index])))


def _several_answers(element: str, count: int) -> str:
    return (
        f"labels must be one answer after one prompt, which the adapter edits; {element} has "
        f"{count} runs of labels that are not {IGNORED}: {_WHAT_TO_DO}"
    )


class CheckedCollator:
    """A collator that passes its batches to :func:`check_batch` on the host, before they are moved
    to a device."""

    def __init__(self, collate: Callable[..., Any]) -> None:
        self.collate = collate

    def __call__(self, features: Any) -> Any:
        batch = self.collate(features)
        check_batch(batch)
        return batch
