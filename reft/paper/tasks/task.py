"""Data classes of tasks: prompts, targets, data sets, decoding and scoring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Score of a generated answer.

    Attributes:
        response: the text after the trigger, without leading white space.
        answer: the answer extracted from it.
        credit: 1.0 if it is the record's answer, else 0.0; between them if a rule scores parts.
    """

    response: str
    answer: str
    credit: float

    @property
    def correct(self) -> bool:
        """Whether the credit is full."""
        return self.credit == 1.0


#: (decoded text with the prompt, record, name of its set) -> verdict.
Scoring = Callable[[str, Record, str], Verdict]


@dataclass(frozen=True)
class GenerationTask:
    """A task whose answers are generated.

    Attributes:
        name: name of the task.
        train_set: the training set, or several joined by "+".
        eval_sets: the test sets.
        eval_split: the split of the test sets, such as "test".
        fields: required text fields of a record.
        prompt: makes the prompt of a record.
        target: makes the target of a record, without the end-of-sequence token.
        trigger: text whose first occurrence in the decoded text precedes the answer.
        decodings: name -> arguments of ``generate``; the published command used the first.
        scorings: name -> scoring rule; empty if a judge must score.
        example: a record, for messages.
        judge: how to have answers judged if there is no rule.
        prepare: set -> function that converts its rows to records, if they have another form.
    """

    name: str
    train_set: str
    eval_sets: tuple[str, ...]
    eval_split: str
    fields: tuple[str, ...]
    prompt: Callable[[Record], str]
    target: Callable[[Record], str]
    trigger: str
    decodings: Mapping[str, Mapping[str, Any]]
    scorings: Mapping[str, Scoring]
    example: Record
    judge: str = ""
    prepare: Mapping[str, Callable[[Record], Record]] = field(default_factory=dict)


@dataclass(frozen=True)
class ClassificationTask:
    """A task for a classification or regression head.

    Attributes:
        name: such as "glue/cola".
        train_set: such as "cola".
        keys: names of the fields with one or two texts.
        labels: names of the labels; empty for a regression.
        metric: a name in :mod:`reft.paper.tasks.metrics`.
        eval_split: the split for evaluation.
        example: a record, for messages.
    """

    name: str
    train_set: str
    keys: tuple[str, str | None]
    labels: tuple[str, ...]
    metric: str
    eval_split: str
    example: Record

    @property
    def eval_sets(self) -> tuple[str, ...]:
        """The test sets: the set itself."""
        return (self.train_set,)

    @property
    def fields(self) -> tuple[str, ...]:
        """Required text fields of a record."""
        return tuple(key for key in self.keys if key is not None)


Task = GenerationTask | ClassificationTask
