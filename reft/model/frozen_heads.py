"""Warning about a frozen classification head, which is a mistake if the head is untrained."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection

from torch import nn

from reft.config import HEAD_MODULES
from reft.model.registry import SUBMODULE

logger = logging.getLogger(__name__)

#: End of the name of a class with a head -> PEFT's name of the task.
_TASKS = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
}
_WITH_HEAD = re.compile(r"For\w*?(\w+Classification|QuestionAnswering|MultipleChoice)$")


def report_frozen_head(base: nn.Module, blocks: str, name: str, trained: Collection[str]) -> None:
    """Log a warning if a classifier's head is, or may be, newly initialised and stays frozen.

    Args:
        base: a transformers model, frozen except for PEFT's trainable parameters.
        blocks: path of the blocks that are edited.
        name: name of the adapter.
        trained: paths of the modules that the adapter trains in full.
    """
    kind = type(base).__name__
    if not _WITH_HEAD.search(kind):
        return
    new = any(map(_loaded, base.parameters()))
    others = {SUBMODULE, blocks.partition(".")[0], *(path.partition(".")[0] for path in trained)}
    heads = [
        path
        for path, module in base.named_children()
        if path not in others and _is_new_and_frozen(module)
    ]
    if new:  # a checkpoint of another task lacks the pooler below the head, too
        heads += [
            path
            for path, module in base.named_modules()
            if path.endswith(".pooler") and path not in trained and _is_new_and_frozen(module)
        ]
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


def _is_new_and_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters, none of them trainable, and not all read from a file."""
    parameters = list(module.parameters())
    trained = any(parameter.requires_grad for parameter in parameters)
    return bool(parameters) and not trained and not all(map(_loaded, parameters))


def _loaded(parameter: nn.Parameter) -> bool:
    """Whether transformers marked a parameter as read from a file."""
    return bool(getattr(parameter, "_is_hf_initialized", False))
