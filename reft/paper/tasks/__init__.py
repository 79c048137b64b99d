"""Tasks of the paper's experiments: prompts, targets, data sets and scoring rules.

A task needs neither a model nor training: it turns records into prompts and targets, and scores
decoded texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from reft.field_checks import did_you_mean
from reft.paper.tasks.arithmetic import ARITHMETIC_TASK, GSM8K_ORIGINAL_TASK, GSM8K_TASK
from reft.paper.tasks.commonsense import COMMONSENSE_TASK
from reft.paper.tasks.demos import COMPOSITION_TASK, EMOJI_TASK, GOODY2_TASK, MEMORISATION_TASK
from reft.paper.tasks.glue import GLUE_TASKS
from reft.paper.tasks.instruct import ALPACA_TASK, ULTRAFEEDBACK_TASK
from reft.paper.tasks.task import ClassificationTask, GenerationTask, Record, Scoring, Task, Verdict

__all__ = [
    "TASKS",
    "ClassificationTask",
    "GenerationTask",
    "Record",
    "Scoring",
    "Task",
    "Verdict",
    "get_task",
]

_ROWS: tuple[Task, ...] = (
    COMMONSENSE_TASK,
    ARITHMETIC_TASK,
    GSM8K_TASK,
    GSM8K_ORIGINAL_TASK,
    ULTRAFEEDBACK_TASK,
    ALPACA_TASK,
    *GLUE_TASKS,
    MEMORISATION_TASK,
    GOODY2_TASK,
    EMOJI_TASK,
    COMPOSITION_TASK,
)

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ROWS})


def get_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        ValueError: there is no task of this name.
    """
    if name not in TASKS:
        hint = did_you_mean(name, TASKS)
        raise ValueError(f"no task {name!r}{hint}; tasks are {', '.join(TASKS)}")
    return TASKS[name]
