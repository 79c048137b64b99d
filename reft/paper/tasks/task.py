"""What a task is: prompts, targets, sets of data, how answers are generated and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Of one generated answer.

    Attributes:
        response: what follows the trigger, without white space in front.
        answer: what was found in it.
        credit: 1.0 if that is the record's answer, 0.0 if not; between them where a part counts.
    """

    response: str
    answer: str
    credit: float

    @property
    def correct(self) -> bool:
        """Whether all of it is right."""
        return self.credit == 1.0


#: (whole decoded text, prompt included; record; name of its set) -> verdict.
Scoring = Callable[[str, Record, str], Verdict]


@dataclass(frozen=True)
class GenerationTask:
    """A task that is answered in words.

    Attributes:
        name: of the task.
        train_set: what it is trained on.
        eval_sets: what it is scored on.
        eval_split: "test" or another split of them.
        fields: that a record must have, as text.
        prompt: of a record.
        target: what the model is to answer, without the end-of-sequence token.
        trigger: after the first of it in the decoded text the answer begins.
        decodings: name -> arguments of ``generate``; the first is what the published command used.
        scorings: name -> rule; empty where only a judge can score.
        example: a record, for messages.
        judge: how answers are judged where no rule can.
        prepare: set -> what makes a record of one of its rows, where the rows have another form.
            ``train_set`` may name several such sets, with "+" between them.
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
    """A task that a classifier's head answers.

    Attributes:
        name: "glue/cola".
        train_set: "cola".
        keys: fields with the text, or the two texts.
        labels: their names; empty for a regression.
        metric: by which it is scored, a name of :mod:`reft.paper.tasks.metrics`.
        eval_split: of the set.
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
        """The set itself."""
        return (self.train_set,)

    @property
    def fields(self) -> tuple[str, ...]:
        """That a record must have, as text."""
        return tuple(key for key in self.keys if key is not None)


Task = GenerationTask | ClassificationTask
