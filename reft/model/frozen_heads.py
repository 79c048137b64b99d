"""Heads of classifiers that an adapter leaves frozen, which is right only if they were trained."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection

from torch import nn

from reft.config import HEAD_MODULES
from reft.model.registry import SUBMODULE

logger = logging.getLogger(__name__)

#: What the names of classes with a head of their own end in -> PEFT's name of the task.
_TASKS = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
}
_WITH_HEAD = re.compile(r"For\w*?(\w+Classification|QuestionAnswering|MultipleChoice)$")


def report_frozen_head(base: nn.Module, blocks: str, name: str, trained: Collection[str]) -> None:
    """Log a warning if a classifier's head is new, or may be, and nothing trains it.

    Args:
        base: a transformers model, frozen but for what PEFT trains.
        blocks: path of the blocks that are edited.
        name: of the adapter.
        trained: paths of the modules that the adapter trains in full.
    """
    kind = type(base).__name__
    if not _WITH_HEAD.search(kind):
        return
    new = any(map(_loaded, base.parameters()))
    others = {SUBMODULE, blocks.partition(".")[0], *(one.partition(".")[0] for one in trained)}
    heads = [path for path, one in base.named_children() if path not in others and _frozen(one)]
    if new:  # a head on another kind of checkpoint has a new pooler below it
        poolers = (one for one in base.named_modules() if one[0].endswith(".pooler"))
        heads += [path for path, one in poolers if path not in {*trained} and _frozen(one)]
    if not heads:
        return
    tasks = (task for end, task in _TASKS.items() if kind.endswith(end))
    options = [f'task_type="{task}"' for task in tasks if {*heads} <= {*HEAD_MODULES[task]}]
    options.append(f"modules_to_save={heads!r}")
    logger.warning(
        "adapter %r leaves %s of %s frozen, %s: ReftConfig(%s) trains and stores the head with the "
        "adapter",
        name, ", ".join(heads), kind,
        "whose values are random, in no file of the base"
        if new
        else "and if that is a new head, its values are random",
        ") or ReftConfig(".join(options),
    )  # fmt: skip


def _frozen(module: nn.Module) -> bool:
    """Whether a module has parameters, none of them trained, and not all read from a file."""
    parameters = list(module.parameters())
    trained = any(one.requires_grad for one in parameters)
    return bool(parameters) and not trained and not all(map(_loaded, parameters))


def _loaded(parameter: nn.Parameter) -> bool:
    """Whether transformers marked a parameter as read from a file."""
    return bool(getattr(parameter, "_is_hf_initialized", False))
