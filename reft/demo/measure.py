"""Time of a training step, and of the cheapest step that any adapter at its place could have."""

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
    """Medians over the rounds in milliseconds; ``ratio`` is the median of the rounds' ratios."""

    step_ms: float
    floor_ms: float
    ratio: float
    rounds: int


def training_step(model: nn.Module, batch: Mapping[str, Any], lr: float) -> Callable[[], None]:
    """Make a training step with AdamW; each call changes the trainable parameters."""
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=lr,
        weight_decay=0.0,
    )

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def frozen_step(model: nn.Module, block: nn.Module, batch: Mapping[str, Any]) -> Callable[[], None]:
    """Make the baseline step: a forward, and a backward down to the output of ``block``.

    Every adapter at that output has at least this cost. All parameters of the model are frozen and
    stay frozen.
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
    baseline: Callable[[], None],
    device: torch.device,
    *,
    rounds: int = 20,
    warmup: int = 3,
) -> StepTimes:
    """Time two steps alternately, so that other load on the machine affects both.

    Args:
        step, baseline: the functions to time.
        device: the device that they run on, synchronised around each call.
        rounds: timed calls of each, at least 1. Their order alternates.
        warmup: calls of each before timing.

    Raises:
        ValueError: rounds is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    for _ in range(warmup):
        step()
        baseline()
    steps: list[float] = []
    baselines: list[float] = []
    for number in range(rounds):
        turns = [(step, steps), (baseline, baselines)]
        for call, times in turns if number % 2 else reversed(turns):
            _wait(device)
            began = time.perf_counter()
            call()
            _wait(device)
            times.append(1e3 * (time.perf_counter() - began))
    ratios = [a / b for a, b in zip(steps, baselines, strict=True)]
    return StepTimes(
        statistics.median(steps), statistics.median(baselines), statistics.median(ratios), rounds
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
