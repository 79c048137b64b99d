"""What a training step costs, against the least that any adapter in the same place could cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Medians over the rounds, in milliseconds; ``ratio`` is the median of the rounds' ratios."""

    step_ms: float
    floor_ms: float
    ratio: float
    rounds: int


def training_step(model: nn.Module, batch: Mapping[str, Any], lr: float) -> Callable[[], None]:
    """Forward, backward and AdamW on what is trained; each call changes the model."""
    optimizer = torch.optim.AdamW(
        [one for one in model.parameters() if one.requires_grad], lr=lr, weight_decay=0.0
    )

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def frozen_step(model: nn.Module, block: nn.Module, batch: Mapping[str, Any]) -> Callable[[], None]:
    """The floor: a plain model's forward, and its backward down to the output of ``block``.

    Whoever trains something at that output and leaves the weights alone pays this much, whatever
    it is. The model's parameters are frozen, and stay so; nothing is trained.
    """
    model.requires_grad_(False)

    def leaf(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.detach().requires_grad_()
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def step() -> None:
        handle = block.register_forward_hook(leaf)
        try:
            model(**batch).loss.backward()
        finally:
            handle.remove()

    return step


def compare_steps(
    step: Callable[[], None],
    floor: Callable[[], None],
    device: torch.device,
    *,
    rounds: int = 20,
    warmup: int = 3,
) -> StepTimes:
    """Time two steps in turns, so that whatever else the machine does hits both.

    Args:
        step, floor: what to call.
        device: where they run; waited for around each call.
        rounds: how often each is timed; at least 1. Which of the two is first changes every round.
        warmup: calls of each before that.

    Raises:
        ValueError: rounds below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    for _ in range(warmup):
        step()
        floor()
    steps: list[float] = []
    floors: list[float] = []
    for number in range(rounds):
        turns = [(step, steps), (floor, floors)]
        for call, times in turns if number % 2 else reversed(turns):
            _wait(device)
            began = time.perf_counter()
            call()
            _wait(device)
            times.append(1e3 * (time.perf_counter() - began))
    ratios = [a / b for a, b in zip(steps, floors, strict=True)]
    return StepTimes(
        statistics.median(steps), statistics.median(floors), statistics.median(ratios), rounds
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
