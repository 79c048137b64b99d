"""How the published code cuts validation sets in two."""

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

#: Of a validation set of more rows than MANY, so many choose the checkpoint; else half of them.
MANY, SELECTION = 5000, 1000

#: The last rows of GSM8K's training set, on which settings are chosen.
GSM8K_DEVELOPMENT = 300

#: number of rows, rows that choose -> numbers of the rows that choose, and of those that are scored
Rule = Callable[[int, int], tuple[list[int], list[int]]]


def glue_split(
    records: Sequence[Record], seed: int, rule: str = "original"
) -> tuple[list[Record], list[Record]]:
    """(records on which the best checkpoint is chosen, records that are scored).

    Args:
        records: a validation set.
        seed: of the run; each has a cut of its own.
        rule: "original", ``train_test_split`` of datasets, with which the paper's numbers were
            made; "pyreft", ``random_split`` of torch, of pyreft's later example.

    Raises:
        ValueError: no such rule; fewer than two records.
    """
    if rule not in SPLITS:
        raise ValueError(f"split_rule must be one of {', '.join(SPLITS)}; got {rule!r}")
    count = len(records)
    if count < 2:
        raise ValueError(f"a validation set is cut in two, so that it needs 2 records, got {count}")
    chosen = SELECTION if count > MANY else count // 2
    with _seeded(seed):
        selection, rest = SPLITS[rule](count, chosen)
    return [records[row] for row in selection], [records[row] for row in rest]


def gsm8k_split(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """(what is left of GSM8K's training set, its last 300 records, on which settings are chosen).

    Of a smaller set, which is not GSM8K's, a quarter.
    """
    held = min(GSM8K_DEVELOPMENT, len(records) // 4)
    return list(records[: len(records) - held]), list(records[len(records) - held :])


def _original(count: int, chosen: int) -> tuple[list[int], list[int]]:
    from datasets import Dataset

    # Without a seed of its own it takes one from NumPy's state, which the run's seed has set.
    parts = Dataset.from_dict({"row": range(count)}).train_test_split(test_size=chosen)
    return list(parts["test"]["row"]), list(parts["train"]["row"])


def _pyreft(count: int, chosen: int) -> tuple[list[int], list[int]]:
    rows: Any = range(count)
    rest, selection = torch.utils.data.random_split(rows, [count - chosen, chosen])
    return list(selection.indices), list(rest.indices)


SPLITS: Mapping[str, Rule] = MappingProxyType({"original": _original, "pyreft": _pyreft})


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The state right after ``set_seed(seed)``; the caller's is put back."""
    kept, array = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(kept)
            np.random.set_state(array)  # noqa: NPY002
