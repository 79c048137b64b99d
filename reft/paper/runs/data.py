"""Data of a run: records for training, for selecting the checkpoint and for testing."""

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
from reft.positions import IGNORED


@dataclass(frozen=True)
class TestSet:
    """Records that are scored after training, and the name of their score."""

    name: str
    records: tuple[Record, ...]


@dataclass(frozen=True)
class RunData:
    """Records of a run before tokenization.

    Attributes:
        task: the task of the preset.
        training: training records in the order of encoding; Trainer shuffles them again.
        selection: the part of the validation set that chooses the best checkpoint.
        tests: sets that are scored after training.
        sources: name of each set -> its source, hash and number of records.
    """

    task: Task
    training: tuple[Record, ...]
    selection: tuple[Record, ...]
    tests: tuple[TestSet, ...]
    sources: Mapping[str, Mapping[str, Any]]


def read_data(preset: Preset, data: Path | None, seed: int) -> RunData:
    """Read the training and test sets of a preset.

    As in the published code, the training set is shuffled with the seed of the run, and a limit
    takes the first records after shuffling.

    Args:
        preset: names the sets and limits their records.
        data: folder of the sets; None for the hub.
        seed: seed of the run.

    Raises:
        FileNotFoundError, ValueError: see :func:`reft.paper.tasks.read.read_set`. No model is
            loaded before.
    """
    task = get_task(preset.task)
    train = read_set(task, task.train_set, "train", data)
    sources = {"train": _source(train)}
    records: tuple[Record, ...] = train.records
    selection: tuple[Record, ...] = ()
    tests: list[TestSet] = []
    for name in preset.eval.sets:
        test, records = _test_records(task, name, preset, data, train, records)
        sources[name] = _source(test)
        limit = preset.eval.max_records
        tests.append(TestSet(name, test.records[:limit]))
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
    """Encode records as features for :class:`reft.ReftDataCollator`, token ids as int32 arrays."""
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
    """Encode the prompts of records as token ids."""
    return [encode_prompt(task, record, tokenizer, max_length) for record in records]


def count_without_label(features: Sequence[Mapping[str, Any]]) -> int:
    """Count the features without a label, whose prompts fill ``max_length``."""
    return sum(
        "labels" in feature and not (feature["labels"] != IGNORED).any() for feature in features
    )


def _test_records(
    task: Task,
    name: str,
    preset: Preset,
    data: Path | None,
    train: RecordSet,
    records: tuple[Record, ...],
) -> tuple[RecordSet, tuple[Record, ...]]:
    """Return the test set, and the records that remain for training."""
    held_out = preset.eval.split == "validation" and isinstance(task, GenerationTask)
    if held_out and name == task.train_set:  # GSM8K has no validation set
        rest, development = gsm8k_split(records)
        return RecordSet(tuple(development), f"{train.source}, its end", train.sha256), tuple(rest)
    return read_set(task, name, preset.eval.split, data), records


def _source(read: RecordSet) -> dict[str, Any]:
    return {"source": read.source, "sha256": read.sha256, "records": len(read.records)}


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """Yield the order in which ``datasets`` shuffles ``count`` rows, as in the published code."""
    yield from Dataset.from_dict({"row": range(count)}).shuffle(seed=seed)["row"]


def _rounded(label: float, dtype: str) -> float:
    """Round a regression label to ``dtype``, as the published trainer does."""
    import torch

    return torch.tensor(label, dtype=getattr(torch, dtype)).item()
