"""Parts of the trainers' tests: a run with checkpoints, its losses, its trainable parameters."""

from __future__ import annotations

import torch
from transformers import TrainerCallback

#: Arguments of a run of four steps with a checkpoint after the second.
RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


class StopAt(TrainerCallback):
    """Stop training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def trainable_values(model) -> dict[str, torch.Tensor]:
    """Copies of the trainable parameters by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def all_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same names and the same bits."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def losses(trainer) -> list[float]:
    """The logged training losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
