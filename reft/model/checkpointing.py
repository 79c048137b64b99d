"""Activation checkpointing of a frozen base, without the gradients it does not need.

transformers makes the embeddings' output require grad when checkpointing is switched on, so that
backward recomputes and walks every block down to the first. Only reentrant checkpointing needs it.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def enable(base: nn.Module, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call ``base.<method>(*args, **kwargs)``, transformers' switch, and leave inputs as they were.

    Raises:
        AttributeError: the base has no such method.
    """
    asked_for = bool(getattr(base, "_require_grads_hooks", None))
    getattr(base, method)(*args, **kwargs)
    disable = getattr(base, "disable_input_require_grads", None)
    if not asked_for and disable is not None and not _reentrant(base):
        disable()


def _reentrant(base: nn.Module) -> bool:
    for module in base.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None:
            # Unsaid, torch decides, and torch has changed its mind before.
            return getattr(function, "keywords", {}).get("use_reentrant", True) is not False
    return True
