"""What values the settings of a preset may have, and the errors that say so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from reft.field_checks import (
    NAME,
    TEXT,
    FieldCheck,
    choice,
    distinct,
    integer,
    is_number,
    number,
    optional,
)
from reft.paper.tasks import ClassificationTask, GenerationTask, Task
from reft.safe_read import shown

if TYPE_CHECKING:
    from reft.paper.presets.schema import EvalSettings, TrainSettings

_PATH = re.compile(r"[A-Za-z0-9_-][\w.-]*(/[A-Za-z0-9_-][\w.-]*)*", re.ASCII)

#: Names of :func:`reft.paper.tasks.split.glue_split`, whose module needs torch.
SPLIT_RULES = ("original", "pyreft")

#: Those of transformers that need no further settings.
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


def check_task(task: Task, train: TrainSettings, evaluation: EvalSettings) -> None:
    """Refuse what is no set, decoding, scoring or metric of the task."""
    chosen = ""
    rows: list[tuple[str, str | None, tuple[str | None, ...]]] = [
        ("eval.sets", one, task.eval_sets) for one in evaluation.sets
    ]
    if isinstance(task, GenerationTask):
        rows += [
            ("eval.decoding", evaluation.decoding, tuple(task.decodings)),
            ("eval.scoring", evaluation.scoring, (*task.scorings, None)),
            ("eval.split_rule", evaluation.split_rule, (None,)),
            ("train.select_by", train.select_by, (None,)),
            ("train.label_dtype", train.label_dtype, (None,)),
        ]
    elif isinstance(task, ClassificationTask):
        # An epoch is chosen on a part of the set: neither goes without the other.
        cut = evaluation.split_rule is not None
        chosen = " with an eval.split_rule" if cut else " without an eval.split_rule"
        rounded = (None,) if task.labels else ("bfloat16", None)
        rows += [
            ("eval.decoding", evaluation.decoding, (None,)),
            ("eval.scoring", evaluation.scoring, (None,)),
            ("train.select_by", train.select_by, (task.metric if cut else None,)),
            ("train.label_dtype", train.label_dtype, rounded),
        ]
    for name, value, allowed in rows:
        if value not in allowed:
            options = " or ".join("none" if one is None else one for one in allowed)
            where = task.name + (chosen if name == "train.select_by" else "")
            raise ValueError(f"{name} must be {options} for the task {where}, got {shown(value)}")


# -------------------------------------------------------------------- checks

#: Checkpoints and random generators hold 64-bit integers.
COUNT = integer(1, bits=63)

SCORES = FieldCheck(
    "a table of numbers",
    lambda value: isinstance(value, Mapping) and all(map(is_number, value.values())),
)

PRESET: Mapping[str, FieldCheck] = MappingProxyType(
    {
        # A run's folder has this name.
        "name": FieldCheck(
            "words of letters, digits and -_. with / between, such as "
            "glue/roberta-base/cola/loreft",
            lambda value: isinstance(value, str) and _PATH.fullmatch(value) is not None,
        ),
        **dict.fromkeys(("title", "task", "method", "model", "hub_id"), NAME),
    }
)

TRAIN: Mapping[str, FieldCheck] = MappingProxyType(
    {
        "learning_rate": number(0, exclusive=True),
        "epochs": number(0, exclusive=True),
        "batch_size": COUNT,
        "accumulate": COUNT,
        "warmup": number(0, below=1),
        "weight_decay": number(0),
        "schedule": choice(*SCHEDULES),
        "optimizer": choice(*OPTIMIZERS),
        "max_grad_norm": number(0),
        "max_length": COUNT,
        "dtype": choice("auto", "float32", "bfloat16", "float16"),
        "seeds": distinct(integer(0, bits=63), "different integers such as 42,43"),
        "max_records": optional(COUNT),
        "select_by": optional(NAME),
        "label_dtype": optional(choice("bfloat16")),
    }
)

EVAL: Mapping[str, FieldCheck] = MappingProxyType(
    {
        "sets": distinct(NAME, "different names of sets such as boolq,piqa"),
        "split": choice(*SPLITS),
        "batch_size": COUNT,
        "decoding": optional(NAME),
        "scoring": optional(NAME),
        "split_rule": optional(choice(*SPLIT_RULES)),
        "max_records": optional(COUNT),
    }
)

PUBLISHED: Mapping[str, FieldCheck] = MappingProxyType(
    {
        "table": TEXT,
        "percent": optional(number(0, exclusive=True)),
        "params": optional(COUNT),
        "scores": SCORES,
        "average": optional(number(0)),
        "sd": SCORES,
        "note": TEXT,
    }
)
