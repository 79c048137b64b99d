"""TRL's own trainers, which know transformers' models and PEFT's and no wrapper around them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

_OURS = (
    "use reft.ReftSFTTrainer, ReftDPOTrainer, ReftKTOTrainer or ReftGRPOTrainer, which take TRL's "
    "arguments"
)

#: The tag of the trainer whose loss is that of the model's own forward on whole texts.
_TAKES_ANY = "reward-trainer"


class RefusesTrl(nn.Module):
    """Says which trainers to use, where TRL's own would fail or score prompts that are none."""

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        if name == "forward" and _is_fused(value):
            raise TypeError(
                "TRL's trainers put a fused head into a transformers model, and got a ReftModel, "
                f"which is a wrapper around one: {_OURS}"
            )
        super().__setattr__(name, value)

    def add_model_tags(self, tags: str | Iterable[str]) -> None:
        """The base model's.

        Raises:
            TypeError: a trainer of TRL's says its name that cannot train a ReftModel.
        """
        named = {tags} if isinstance(tags, str) else set(tags)
        if "trl" in named and _TAKES_ANY not in named:
            (*others,) = sorted(named - {"trl"})
            raise TypeError(
                f"TRL's trainer {', '.join(others)} does not take a ReftModel, whose edits need to "
                f"be told where prompts end: {_OURS}"
            )
        self.base_model.add_model_tags(tags)  # type: ignore[operator, union-attr]


def _is_fused(forward: Any) -> bool:
    try:
        return "fused_lm_head" in inspect.signature(forward, follow_wrapped=False).parameters
    except (TypeError, ValueError):
        return False
