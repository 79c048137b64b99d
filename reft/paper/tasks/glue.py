"""The eight GLUE tasks of the paper."""

from __future__ import annotations

from reft.paper.tasks.task import ClassificationTask

_PAIR = ("sentence1", "sentence2")
_SAME = ("not_equivalent", "equivalent")
_FOLLOWS = ("entailment", "not_entailment")

#: Set -> text fields, labels, metric, evaluation split.
_ROWS: dict[str, tuple[tuple[str, str | None], tuple[str, ...], str, str]] = {
    "cola": (
        ("sentence", None),
        ("unacceptable", "acceptable"),
        "matthews_correlation",
        "validation",
    ),
    "mnli": (
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        "validation_matched",
    ),
    "mrpc": (_PAIR, _SAME, "accuracy", "validation"),
    "qnli": (("question", "sentence"), _FOLLOWS, "accuracy", "validation"),
    "qqp": (
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        "accuracy",
        "validation",
    ),
    "rte": (_PAIR, _FOLLOWS, "accuracy", "validation"),
    "sst2": (("sentence", None), ("negative", "positive"), "accuracy", "validation"),
    "stsb": (_PAIR, (), "pearson", "validation"),
}

GLUE_TASKS = tuple(
    ClassificationTask(
        name=f"glue/{name}",
        train_set=name,
        keys=keys,
        labels=labels,
        metric=metric,
        eval_split=split,
        example={key: "A sentence." for key in keys if key} | {"label": 1 if labels else 2.5},
    )
    for name, (keys, labels, metric, split) in _ROWS.items()
)
