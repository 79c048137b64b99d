"""Refusal of TRL's own trainers, which cannot train a :class:`reft.ReftModel`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

_INSTEAD = (
    "use reft.ReftSFTTrainer, ReftDPOTrainer, ReftKTOTrainer or ReftGRPOTrainer, which take TRL's "
    "arguments"
)

#: The tag of the only trainer that works: its loss is a plain forward on whole texts.
_SUPPORTED = "reward-trainer"


class RefusesTrl(nn.Module):
    """Mixin that refuses TRL's trainers, which would fail or take a wrong part of each text for the
    prompt, and names the trainers to use instead."""

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        if name == "forward" and _is_fused(value):
            raise TypeError(
                "this trainer of TRL installs a fused head in a transformers model, and got a "
                f"ReftModel, which is a wrapper around one: {_INSTEAD}"
            )
        super().__setattr__(name, value)

    def add_model_tags(self, tags: str | Iterable[str]) -> None:
        """Add tags to the base model's card, as TRL's trainers do.

        Raises:
            TypeError: the tags are those of a trainer that cannot train a ReftModel.
        """
        named = {tags} if isinstance(tags, str) else set(tags)
        if "trl" in named and _SUPPORTED not in named:
            (*others,) = sorted(named - {"trl"})
            raise TypeError(
                f"TRL's trainer {', '.join(others)} does not take a ReftModel, whose edits need "
                f"the length of each prompt: {_INSTEAD}"
            )
        self.base_model.add_model_tags(tags)  # type: ignore[operator, union-attr]


def _is_fused(forward: Any) -> bool:
    """Whether a function is the forward with a fused head that TRL installs."""
    try:
        return "fused_lm_head" in inspect.signature(forward, follow_wrapped=False).parameters
    except (TypeError, ValueError):
        return False
