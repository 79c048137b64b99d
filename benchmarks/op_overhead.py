"""What a training step runs that the floor does not, and how long that takes.

On a shared machine the matrix products of two equal models differ by a few percent from process to
process, and by more from round to round: more than an adapter may cost. But an operator that both
sides call equally often with the same shapes is the same work. So the *counted* overhead adds up
only the others, as PyTorch's profiler times them, and the Python between operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile, record_function

_STEP = "benchmark step"


@dataclass(frozen=True, slots=True)
class Profile:
    """One step on a CPU.

    Attributes:
        calls: operator and shapes -> (number of calls, seconds in it and in nothing below it).
        between: seconds outside of all operators.
    """

    calls: dict[str, tuple[int, float]]
    between: float


def profiled(step: Callable[[], object]) -> Profile:
    """Run a step under the profiler."""
    with (
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found,
        record_function(_STEP),
    ):
        step()
    calls, between = {}, 0.0
    for event in found.key_averages(group_by_input_shape=True):
        seconds = 1e-6 * event.self_cpu_time_total
        if event.key == _STEP:
            between = seconds
        else:
            calls[f"{event.key} {event.input_shapes}"] = event.count, seconds
    return Profile(calls, between)


def added(own: Profile, floor: Profile) -> float:
    """Seconds of ``own`` beyond ``floor``: of the calls that only one of them makes, at the average
    time of their operator and shapes, and between operators."""
    none = (0, 0.0)
    seconds = own.between - floor.between
    for name in own.calls.keys() | floor.calls.keys():
        (count, mine), (other, theirs) = own.calls.get(name, none), floor.calls.get(name, none)
        if count > other:
            seconds += mine * (count - other) / count
        elif count < other:
            seconds -= theirs * (other - count) / other
    return seconds
