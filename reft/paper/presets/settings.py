"""Training and evaluation settings of a preset and its published results, with their checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from reft.field_checks import (
    NAME,
    TEXT,
    FieldCheck,
    check_fields,
    choice,
    distinct,
    integer,
    is_number,
    number,
    optional,
)

#: Names of :func:`reft.paper.tasks.split.glue_split`, whose module needs torch.
SPLIT_RULES = ("original", "pyreft")

#: Schedules of transformers that need no further arguments.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adafactor", "sgd")

SPLITS = ("train", "validation", "validation_matched", "validation_mismatched", "test", "eval")

#: Checkpoints and random generators hold 64-bit integers.
_COUNT = integer(1, bits=63)

_SCORES = FieldCheck(
    "a table of numbers",
    lambda value: isinstance(value, Mapping) and all(map(is_number, value.values())),
)

TRAIN_CHECKS: Mapping[str, FieldCheck] = MappingProxyType(
    {
        "learning_rate": number(0, exclusive=True),
        "epochs": number(0, exclusive=True),
        "batch_size": _COUNT,
        "accumulate": _COUNT,
        "warmup": number(0, below=1),
        "weight_decay": number(0),
        "schedule": choice(*SCHEDULES),
        "optimizer": choice(*OPTIMIZERS),
        "max_grad_norm": number(0),
        "max_length": _COUNT,
        "dtype": choice("auto", "float32", "bfloat16", "float16"),
        "seeds": distinct(integer(0, bits=63), "different integers such as 42,43"),
        "max_records": optional(_COUNT),
        "select_by": optional(NAME),
        "label_dtype": optional(choice("bfloat16")),
    }
)

EVAL_CHECKS: Mapping[str, FieldCheck] = MappingProxyType(
    {
        "sets": distinct(NAME, "different names of sets such as boolq,piqa"),
        "split": choice(*SPLITS),
        "batch_size": _COUNT,
        "decoding": optional(NAME),
        "scoring": optional(NAME),
        "split_rule": optional(choice(*SPLIT_RULES)),
        "max_records": optional(_COUNT),
    }
)

PUBLISHED_CHECKS: Mapping[str, FieldCheck] = MappingProxyType(
    {
        "table": TEXT,
        "percent": optional(number(0, exclusive=True)),
        "params": optional(_COUNT),
        "scores": _SCORES,
        "average": optional(number(0)),
        "sd": _SCORES,
        "note": TEXT,
    }
)


@dataclass(frozen=True)
class TrainSettings:
    """Training settings of a run.

    Attributes:
        learning_rate: the peak learning rate.
        epochs: passes over the data.
        batch_size: sequences per device and forward.
        accumulate: gradient accumulation steps.
        warmup: the share of the optimizer steps in which the learning rate rises.
        weight_decay: weight decay of AdamW.
        schedule: learning rate schedule, a name of transformers.
        optimizer: a name of transformers.
        max_grad_norm: the norm that gradients are clipped to.
        max_length: maximum tokens of a prompt, and of prompt and target together.
        dtype: data type of the base model; "auto" is bfloat16 on a GPU and float32 elsewhere.
        seeds: one run for each.
        max_records: take only this many training records after shuffling; None for all.
        select_by: the metric that chooses the best epoch; None to keep the last step.
        label_dtype: data type that regression labels are rounded to; None for no rounding.
    """

    learning_rate: float
    epochs: float
    batch_size: int
    accumulate: int
    warmup: float
    weight_decay: float
    schedule: str
    optimizer: str
    max_grad_norm: float
    max_length: int
    dtype: str
    seeds: tuple[int, ...]
    max_records: int | None = None
    select_by: str | None = None
    label_dtype: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "train", TRAIN_CHECKS)


@dataclass(frozen=True)
class EvalSettings:
    """Evaluation settings of a run.

    Attributes:
        sets: names of the data sets.
        split: the split of each set.
        batch_size: sequences per forward.
        decoding: name of the task's arguments of ``generate``; None for a classification.
        scoring: name of the task's scoring rule; None for a classification, or if a judge scores.
        split_rule: how the set is split in two, one part for choosing the best epoch; None for no
            split.
        max_records: take only this many records of each set; None for all.
    """

    sets: tuple[str, ...]
    split: str
    batch_size: int
    decoding: str | None = None
    scoring: str | None = None
    split_rule: str | None = None
    max_records: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, "eval", EVAL_CHECKS)


@dataclass(frozen=True)
class Published:
    """Published results of a run, in percent; empty if none were published.

    Attributes:
        table: the table of the paper.
        percent: trainable parameters in percent of the base model's, as printed.
        params: number of trainable parameters.
        scores: set -> score.
        average: average of the scores.
        sd: set -> standard deviation, as printed.
        note: anything else that a reader should know.
    """

    table: str = ""
    percent: float | None = None
    params: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    average: float | None = None
    sd: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "published", PUBLISHED_CHECKS)
