"""Splits of validation sets, as in the published code."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from reft.paper.tasks.task import Record

#: A validation set of more than MANY rows gives SELECTION rows for choosing the checkpoint, a
#: smaller set gives half of its rows.
MANY, SELECTION = 5000, 1000

#: Number of rows at the end of GSM8K's training set that choose settings.
GSM8K_DEVELOPMENT = 300

#: (number of rows, number of selection rows) -> indices of the selection rows and of the test rows.
Rule = Callable[[int, int], tuple[list[int], list[int]]]


def glue_split(
    records: Sequence[Record], seed: int, rule: str = "original"
) -> tuple[list[Record], list[Record]]:
    """Split a validation set into records that choose the best checkpoint and test records.

    Args:
        records: a validation set.
        seed: seed of the run, on which the split depends.
        rule: "original", ``train_test_split`` of datasets as for the paper's results; "pyreft",
            ``random_split`` of torch as in pyreft's later example.

    Raises:
        ValueError: the rule is unknown, or there are fewer than two records.
    """
    if rule not in SPLITS:
        raise ValueError(f"split_rule must be one of {', '.join(SPLITS)}; got {rule!r}")
    count = len(records)
    if count < 2:
        raise ValueError(f"a validation set must have at least 2 records to be split, got {count}")
    chosen = SELECTION if count > MANY else count // 2
    with _seeded(seed):
        selection, rest = SPLITS[rule](count, chosen)
    return [records[row] for row in selection], [records[row] for row in rest]


def gsm8k_split(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Split GSM8K's training set into training records and the last 300 for choosing settings.

    A smaller set, which is not GSM8K's, gives a quarter of its records for choosing.
    """
    held = min(GSM8K_DEVELOPMENT, len(records) // 4)
    return list(records[: len(records) - held]), list(records[len(records) - held :])


def _original(count: int, chosen: int) -> tuple[list[int], list[int]]:
    from datasets import Dataset

    # Without a seed argument it uses NumPy's state, which the seed of the run has set.
    parts = Dataset.from_dict({"row": range(count)}).train_test_split(test_size=chosen)
    return list(parts["test"]["row"]), list(parts["train"]["row"])


def _pyreft(count: int, chosen: int) -> tuple[list[int], list[int]]:
    rows: Any = range(count)
    rest, selection = torch.utils.data.random_split(rows, [count - chosen, chosen])
    return list(selection.indices), list(rest.indices)


SPLITS: Mapping[str, Rule] = MappingProxyType({"original": _original, "pyreft": _pyreft})


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Set all seeds within the context, and restore the caller's random states afterwards."""
    kept, array = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(kept)
            np.random.set_state(array)  # noqa: NPY002
