"""Activation checkpointing of a frozen base with edits.

A block that is recomputed in backward must follow the plan of its own forward. transformers before
5.23 recomputes a block with its hooks; later versions recompute it without its own hooks, but with
those of its submodules. So the checkpointing function itself restores the plan.

transformers makes the embeddings' output require grad when checkpointing is enabled, so that
backward recomputes every block down to the first. Only reentrant checkpointing needs that.
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
    """A checkpointing function whose recomputation has the plan of its forward."""

    def __init__(self, checkpoint: Callable[..., Any], registry: AdapterRegistry) -> None:
        self.checkpoint, self.registry = checkpoint, registry

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.checkpoint(run, *args, **kwargs)
        plan = self.registry.call.plan

        def run_with_plan(*inputs: Any, **named: Any) -> Any:
            if torch._C._current_graph_task_id() == -1:
                return run(*inputs, **named)
            with self.registry.restoring(plan):
                return run(*inputs, **named)

        return self.checkpoint(run_with_plan, *args, **kwargs)


def enable(
    base: nn.Module,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Enable checkpointing by ``base.<method>(*args, **kwargs)``, transformers' own method.

    Unless checkpointing is reentrant, the embeddings' output does not require grad because of it.

    Raises:
        AttributeError: the base has no such method.
    """
    requested = bool(getattr(base, "_require_grads_hooks", None))
    getattr(base, method)(*args, **kwargs)
    disable = getattr(base, "disable_input_require_grads", None)
    if not requested and disable is not None and not _reentrant(base):
        disable()


def keep_plans(registry: AdapterRegistry) -> None:
    """Make every checkpointing function of the blocks restore plans.

    This is called in every forward that records gradients, because trainers such as TRL's may
    disable and enable checkpointing during training. It looks at one block, and at the others only
    if checkpointing was enabled in that one.
    """
    present = registry.blocks.layers[0].__dict__.get(NAME)
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
            # Without the keyword torch decides, and its default may change: assume reentrant.
            return getattr(function, "keywords", {}).get("use_reentrant", True) is not False
    return True
