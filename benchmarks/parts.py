"""A training step cut at its blocks, and the time it would take if nothing disturbed it.

On a machine that is shared, no step of seconds runs undisturbed, and medians of whole steps differ
by several percent from one run to the next. A part of a step, between one block and the next, takes
a tenth of a second, and in one of many rounds nobody is in its way. The *undisturbed* step is the
sum over the parts of each part's fastest time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from benchmarks.timing import Quantiles
from reft.model.sites import find_sites


class Parts:
    """Notes the time inside every block of a base model, in forward and in backward.

    The marks are on the last module inside each block, not on what blocks hand on: an adapter that
    edits there finds everything as it is without them.
    """

    def __init__(self, base: nn.Module) -> None:
        self._marks: list[float] = []
        for block in find_sites(base).blocks:
            inner = list(block.children())[-1]
            inner.register_forward_hook(self._forward)

    def __call__(self, step: Callable[[], object]) -> list[float]:
        """Seconds of each part of a step, in order."""
        self._marks = [time.perf_counter()]
        step()
        self._marks.append(time.perf_counter())
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]

    def _forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self._marks.append(time.perf_counter())
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, grad: Tensor) -> None:
        self._marks.append(time.perf_counter())


def undisturbed(parts: Sequence[Sequence[float]]) -> float:
    """Seconds: of every part its fastest round, added up.

    Args:
        parts: for each part, one entry a round.
    """
    return sum(min(rounds) for rounds in parts)


def undisturbed_ratio(
    parts: Sequence[Sequence[float]], floor: Sequence[Sequence[float]]
) -> Quantiles:
    """The ratio of two undisturbed steps. In place of p20 and p80 stand those of the even and of
    the odd rounds alone, the smaller first: how far it would be off with half of the effort."""
    low, high = sorted(
        undisturbed([one[half::2] or one for one in parts])
        / undisturbed([one[half::2] or one for one in floor])
        for half in (0, 1)
    )
    return Quantiles(undisturbed(parts) / undisturbed(floor), low, high, len(parts[0]))
