"""Activation checkpointing of a frozen base: with the plan of each forward, and without the
gradients that it does not need.

A block that is run again in backward must follow the plan of its own forward, and what is run again
differs: transformers before 5.23 checkpoints a block with its hooks, later ones without them, but
with those of its parts. So the function that checkpoints is given the plan to restore.

transformers makes the embeddings' output require grad when checkpointing is switched on, so that
backward recomputes and walks every block down to the first. Only reentrant checkpointing needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from reft.model.registry import AdapterRegistry

NAME = "_gradient_checkpointing_func"


class KeepPlan:
    """A checkpointing function whose second run has the plan of the first."""

    def __init__(self, checkpoint: Callable[..., Any], registry: AdapterRegistry) -> None:
        self.checkpoint, self.registry = checkpoint, registry

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.checkpoint(run, *args, **kwargs)
        plan = self.registry.call.plan

        def planned(*inputs: Any, **named: Any) -> Any:
            if torch._C._current_graph_task_id() == -1:
                return run(*inputs, **named)
            with self.registry.restoring(plan):
                return run(*inputs, **named)

        return self.checkpoint(planned, *args, **kwargs)


def enable(
    base: nn.Module,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Call ``base.<method>(*args, **kwargs)``, transformers' switch, and leave inputs as they were.

    Raises:
        AttributeError: the base has no such method.
    """
    asked_for = bool(getattr(base, "_require_grads_hooks", None))
    getattr(base, method)(*args, **kwargs)
    disable = getattr(base, "disable_input_require_grads", None)
    if not asked_for and disable is not None and not _reentrant(base):
        disable()


def keep_plans(registry: AdapterRegistry) -> None:
    """Let every checkpointing function of the blocks restore plans.

    Called in every forward that is recorded, since whoever trains may switch checkpointing off and
    on again, as TRL does; it looks at one block, and further only if that was switched on.
    """
    present = registry.blocks.blocks[0].__dict__.get(NAME)
    if present is None or isinstance(present, KeepPlan):
        return
    for module in registry.blocks.stack.modules():
        function = module.__dict__.get(NAME)
        if function is not None and not isinstance(function, KeepPlan):
            setattr(module, NAME, KeepPlan(function, registry))


def forget_plans(base: nn.Module) -> None:
    """Undo :func:`keep_plans`."""
    for module in base.modules():
        function = module.__dict__.get(NAME)
        if isinstance(function, KeepPlan):
            setattr(module, NAME, function.checkpoint)


def _reentrant(base: nn.Module) -> bool:
    for module in base.modules():
        function = getattr(module, NAME, None)
        if function is not None:
            if isinstance(function, KeepPlan):
                function = function.checkpoint
            # Unsaid, torch decides, and torch has changed its mind before.
            return getattr(function, "keywords", {}).get("use_reentrant", True) is not False
    return True
