"""Operator overhead: the time of operators and Python that a step adds to its baseline.

On a shared machine the matrix products of two equal models differ by a few percent between
processes, and by more between rounds: more than an adapter may cost. But an operator that both
steps call equally often with the same shapes is the same work. The operator overhead therefore
sums only the other calls, as PyTorch's profiler times them, and the Python between operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile, record_function

_STEP = "benchmark step"


@dataclass(frozen=True, slots=True)
class Profile:
    """The profile of a step on a CPU.

    Attributes:
        calls: maps operator and shapes to (number of calls, seconds without nested operators).
        between: seconds outside all operators.
    """

    calls: dict[str, tuple[int, float]]
    between: float


def profiled(step: Callable[[], object]) -> Profile:
    """Run a step under the profiler."""
    with (
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler,
        record_function(_STEP),
    ):
        step()
    calls, between = {}, 0.0
    for event in profiler.key_averages(group_by_input_shape=True):
        seconds = 1e-6 * event.self_cpu_time_total
        if event.key == _STEP:
            between = seconds
        else:
            calls[f"{event.key} {event.input_shapes}"] = event.count, seconds
    return Profile(calls, between)


def added_seconds(step: Profile, baseline: Profile) -> float:
    """Seconds that ``step`` adds to ``baseline``, by calls that only one of them makes.

    Such a call counts with the average time of its operator and shapes. The difference in Python
    between operators is included.
    """
    absent = (0, 0.0)
    seconds = step.between - baseline.between
    for name in step.calls.keys() | baseline.calls.keys():
        count, step_seconds = step.calls.get(name, absent)
        base_count, base_seconds = baseline.calls.get(name, absent)
        if count > base_count:
            seconds += step_seconds * (count - base_count) / count
        elif count < base_count:
            seconds -= base_seconds * (base_count - count) / base_count
    return seconds
