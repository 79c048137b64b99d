"""The data of a run: which records are trained on, selected on and tested on, and as what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from reft.paper.presets import Preset
from reft.paper.tasks import GenerationTask, Record, Task, get_task
from reft.paper.tasks.encode import encode_example, encode_prompt
from reft.paper.tasks.read import RecordSet, read_set
from reft.paper.tasks.split import glue_split, gsm8k_split
from reft.train.labels import IGNORED


@dataclass(frozen=True)
class TestSet:
    """Records that are scored after training, under the name that their score has."""

    name: str
    records: tuple[Record, ...]


@dataclass(frozen=True)
class RunData:
    """The records of one run, before any tokenizer.

    Attributes:
        task: of the preset.
        training: in the order in which they are encoded; Trainer shuffles them again.
        selection: the part of the validation set on which the best checkpoint is chosen.
        tests: what is scored in the end.
        sources: name of each part -> where it came from, its hash and number of records.
    """

    task: Task
    training: tuple[Record, ...]
    selection: tuple[Record, ...]
    tests: tuple[TestSet, ...]
    sources: Mapping[str, Mapping[str, Any]]


def read_data(preset: Preset, data: Path | None, seed: int) -> RunData:
    """Read every set that a preset trains on and is scored on.

    The published code shuffles the training set with the seed of the run and, where a run takes
    only so many records, takes the first of them; so does this.

    Args:
        preset: what to read, and how much of it.
        data: folder of the sets; None for the hub.
        seed: of the run.

    Raises:
        FileNotFoundError, ValueError: as :func:`reft.paper.tasks.read.read_set`, before anything is
            loaded.
    """
    task = get_task(preset.task)
    train = read_set(task, task.train_set, "train", data)
    sources = {"train": _source(train)}
    records: tuple[Record, ...] = train.records
    selection: tuple[Record, ...] = ()
    tests: list[TestSet] = []
    for name in preset.eval.sets:
        found, records = _test_records(task, name, preset, data, train, records)
        sources[name] = _source(found)
        limit = preset.eval.max_records
        tests.append(TestSet(name, found.records[:limit]))
    if preset.eval.split_rule is not None:
        [whole] = tests
        chosen, rest = glue_split(list(whole.records), seed, preset.eval.split_rule)
        selection, tests = tuple(chosen), [TestSet(whole.name, tuple(rest))]
    training = tuple(records[index] for index in _shuffled(len(records), seed))
    return RunData(task, training[: preset.train.max_records], selection, tuple(tests), sources)


def encode_training(
    task: Task,
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    label_dtype: str | None = None,
) -> list[dict[str, Any]]:
    """Records as features for :class:`reft.ReftDataCollator`, token ids as int32 arrays."""
    features = []
    for record in records:
        feature = dict(encode_example(task, record, tokenizer, max_length))
        for name, value in feature.items():
            if isinstance(value, list) and name != "subspaces":
                feature[name] = np.asarray(value, dtype=np.int32)
        if label_dtype is not None:
            feature["label"] = _rounded(feature["label"], label_dtype)
        features.append(feature)
    return features


def encode_prompts(
    task: GenerationTask,
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[list[int]]:
    """The prompts of records as token ids."""
    return [encode_prompt(task, record, tokenizer, max_length) for record in records]


def without_label(features: Sequence[Mapping[str, Any]]) -> int:
    """How many features have no label that a loss counts: their prompts fill ``max_length``."""
    return sum("labels" in one and not (one["labels"] != IGNORED).any() for one in features)


def _test_records(
    task: Task,
    name: str,
    preset: Preset,
    data: Path | None,
    train: RecordSet,
    records: tuple[Record, ...],
) -> tuple[RecordSet, tuple[Record, ...]]:
    """(the set that is scored, what is left to train on)."""
    held_out = preset.eval.split == "validation" and isinstance(task, GenerationTask)
    if held_out and name == task.train_set:  # GSM8K has no validation set of its own
        rest, development = gsm8k_split(records)
        return RecordSet(tuple(development), f"{train.source}, its end", train.sha256), tuple(rest)
    return read_set(task, name, preset.eval.split, data), records


def _source(found: RecordSet) -> dict[str, Any]:
    return {"source": found.source, "sha256": found.sha256, "records": len(found.records)}


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """The order that ``datasets`` gives a set of so many rows, which the published code uses."""
    yield from Dataset.from_dict({"row": range(count)}).shuffle(seed=seed)["row"]


def _rounded(label: float, dtype: str) -> float:
    """A regression's label as the published trainer compares with it."""
    import torch

    return torch.tensor(label, dtype=getattr(torch, dtype)).item()
