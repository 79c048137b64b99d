"""What values the settings of a preset may have, and the errors that say so."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from reft.paper.tasks import ClassificationTask, GenerationTask, Task
from reft.safe_read import is_text, shown

if TYPE_CHECKING:
    from reft.paper.presets.schema import EvalSettings, TrainSettings

_PATH = re.compile(r"[A-Za-z0-9_-][\w.-]*(/[A-Za-z0-9_-][\w.-]*)*", re.ASCII)

#: field -> (whether a value is allowed, what is allowed in words)
Rule = tuple[Callable[[Any], bool], str]

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


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'rank'?)" or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def check_known(what: str, values: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse a field that is not one of ``names``."""
    known = list(names)
    for name in values:
        if name not in known:
            raise ValueError(
                f"{what} has no field {shown(name)}{nearest(str(name), known)}; its fields are "
                f"{', '.join(known)}"
            )


def check_fields(values: Any, section: str, rules: Mapping[str, Rule]) -> None:
    """Refuse a field of ``values`` that its rule does not allow."""
    for name, (allowed, words) in rules.items():
        value = getattr(values, name)
        if not allowed(value):
            raise ValueError(f"{section}.{name} must be {words}, got {shown(value)}")


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


# -------------------------------------------------------------------- rules


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def number(low: float, *, strict: bool = False, below: float = math.inf) -> Rule:
    """At least ``low``, or above it if ``strict``."""

    def allowed(value: Any) -> bool:
        return _is_number(value) and (value > low if strict else value >= low) and value < below

    bound = f"above {low:g}" if strict else f"of at least {low:g}"
    return allowed, f"a number {bound}" + (f" and below {below:g}" if below < math.inf else "")


def integer(low: int) -> Rule:
    """A whole number of at least ``low``."""

    def allowed(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**63

    return allowed, f"a whole number of at least {low}"


def choice(*names: str) -> Rule:
    """One of ``names``."""
    return (lambda value: isinstance(value, str) and value in names), " or ".join(names)


def optional(rule: Rule) -> Rule:
    """That, or None."""
    return (lambda value: value is None or rule[0](value)), f"none or {rule[1]}"


def several(one: Rule, words: str) -> Rule:
    """A tuple, not empty, of different values that ``one`` allows."""

    def allowed(value: Any) -> bool:
        return (
            isinstance(value, tuple)
            and bool(value)
            and all(map(one[0], value))
            and len(set(value)) == len(value)
        )

    return allowed, words


TEXT: Rule = is_text, "text"
NAME: Rule = (lambda value: is_text(value) and bool(value)), "a name"
#: A run's folder is named so.
PATH: Rule = (
    lambda value: isinstance(value, str) and _PATH.fullmatch(value) is not None,
    "words of letters, digits and -_. with / between, such as glue/roberta-base/cola/loreft",
)
SCORES: Rule = (
    lambda value: isinstance(value, Mapping) and all(map(_is_number, value.values())),
    "a table of numbers",
)

PRESET: Mapping[str, Rule] = MappingProxyType(
    {**dict.fromkeys(("name", "title", "task", "method", "model", "hub_id"), NAME), "name": PATH}
)

TRAIN: Mapping[str, Rule] = MappingProxyType(
    {
        "learning_rate": number(0, strict=True),
        "epochs": number(0, strict=True),
        "batch_size": integer(1),
        "accumulate": integer(1),
        "warmup": number(0, below=1),
        "weight_decay": number(0),
        "schedule": choice(*SCHEDULES),
        "optimizer": choice(*OPTIMIZERS),
        "max_grad_norm": number(0),
        "max_length": integer(1),
        "dtype": choice("auto", "float32", "bfloat16", "float16"),
        "seeds": several(integer(0), "different whole numbers such as 42,43"),
        "max_records": optional(integer(1)),
        "select_by": optional(NAME),
        "label_dtype": optional(choice("bfloat16")),
    }
)

EVAL: Mapping[str, Rule] = MappingProxyType(
    {
        "sets": several(NAME, "different names of sets such as boolq,piqa"),
        "split": choice(*SPLITS),
        "batch_size": integer(1),
        "decoding": optional(NAME),
        "scoring": optional(NAME),
        "split_rule": optional(choice(*SPLIT_RULES)),
        "max_records": optional(integer(1)),
    }
)

PUBLISHED: Mapping[str, Rule] = MappingProxyType(
    {
        "table": TEXT,
        "percent": optional(number(0, strict=True)),
        "params": optional(integer(1)),
        "scores": SCORES,
        "average": optional(number(0)),
        "sd": SCORES,
        "note": TEXT,
    }
)
