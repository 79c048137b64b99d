"""Clocks, interleaved rounds and quantiles: the timing of all benchmarks.

Peers are timed in turns within a run, so that a slow phase of the machine affects all of them. The
reported numbers are medians, and the median of the ratios within each round.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

#: A timed run; returns seconds by phase.
Run = Callable[[], Mapping[str, float]]
#: Maps peer and phase to the seconds of each round.
Samples = dict[str, dict[str, list[float]]]


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Median, percentiles and number of rounds of a quantity."""

    median: float
    p20: float
    p80: float
    rounds: int


def quantiles(samples: Sequence[float]) -> Quantiles:
    """Median, 20th and 80th percentile by linear interpolation.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("quantiles need at least one sample, got none")
    if len(samples) == 1:
        return Quantiles(samples[0], samples[0], samples[0], 1)
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Quantiles(statistics.median(samples), fifths[0], fifths[3], len(samples))


def paired_ratio(samples: Sequence[float], reference: Sequence[float]) -> Quantiles:
    """Quantiles of the ratios within each round; a disturbance of both sides cancels."""
    return quantiles([a / b for a, b in zip(samples, reference, strict=True)])


@dataclass(frozen=True, slots=True)
class Effort:
    """The length of a measurement: rounds until ``seconds`` are over, within the two bounds."""

    seconds: float = 10.0
    min_rounds: int = 5
    max_rounds: int = 200
    warmup: int = 2


def interleave(runs: Mapping[str, Run], effort: Effort) -> Samples:
    """Time every run once per round, in an order that rotates from round to round.

    Args:
        runs: maps a peer to its timed run.
        effort: the number of rounds.
    """
    for run in runs.values():
        for _ in range(effort.warmup):
            run()
    samples: Samples = {name: defaultdict(list) for name in runs}
    order = list(runs)
    began = time.perf_counter()
    for count in range(effort.max_rounds):
        if count >= effort.min_rounds and time.perf_counter() - began > effort.seconds:
            break
        turn = count % max(len(order), 1)
        turned = order[turn:] + order[:turn]
        for name in turned if count % 2 else reversed(turned):
            for phase, seconds in runs[name]().items():
                samples[name][phase].append(seconds)
    return samples


class Clock:
    """Times a sequence of steps on a device.

    On a GPU it records events on the stream and synchronises once at the end; elsewhere it reads
    the clock of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        """Wait until all launched work has run."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __call__(self, **steps: Callable[[], object]) -> dict[str, float]:
        """Run the steps in order and return the seconds of each.

        On a GPU, ``host_<step>`` is the time that the host needed to launch the step.
        """
        self.wait()
        if self.device.type != "cuda":
            times = {}
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                times[name] = time.perf_counter() - began
            return times
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        host = {}
        marks[0].record()
        for mark, (name, step) in zip(marks[1:], steps.items(), strict=True):
            began = time.perf_counter()
            step()
            host[f"host_{name}"] = time.perf_counter() - began
            mark.record()
        self.wait()
        spans = zip(steps, itertools.pairwise(marks), strict=True)
        return {name: 1e-3 * a.elapsed_time(b) for name, (a, b) in spans} | host


#: The message of the first failed capture of this process.
_failed_capture: list[str] = []


def failed_capture() -> str | None:
    """The reason why this process captures no more graphs; None if no capture has failed.

    After a failed capture PyTorch's allocator keeps a filter of the deleted graph. A later graph
    could be given memory that belongs to another tensor.
    """
    return f"an earlier capture failed: {_failed_capture[0]}" if _failed_capture else None


def graph_run(phase: str, calls: Sequence[Callable[[], object]], replays: int = 5) -> Run:
    """A run of CUDA-graph replays that returns the seconds of one of ``calls``.

    The calls differ only in their memory. All are captured in one graph, enough of them to outgrow
    the L2 cache. Each call therefore starts with a cold cache, and no time of Python is included.

    Raises:
        RuntimeError: a call failed or cannot be captured, or an earlier capture of this process
            failed (see :func:`failed_capture`).
    """
    earlier = failed_capture()
    if earlier is not None:
        raise RuntimeError(earlier)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except BaseException as error:
        torch.cuda.set_stream(current)  # the capture stream may still be current
        _failed_capture.append((str(error).strip() or type(error).__name__).splitlines()[0][:300])
        raise

    def run() -> dict[str, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return {phase: 1e-3 * begin.elapsed_time(end) / (replays * len(calls))}

    return run
