"""Bytes: the peak of a call, what it allocates, and what autograd keeps for backward."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of one call, in bytes: the most that was held at once, and all that was allocated."""

    peak: int
    allocated: int


def traffic(call: Callable[[], object], device: torch.device) -> Traffic:
    """Count the allocations of a call, which must have run before (caches are warm then)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        before = _cuda_allocated(device)
        call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - held
        return Traffic(peak, _cuda_allocated(device) - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would announce itself
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results = profiler.profiler
    assert results is not None and results.kineto_results is not None
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in results.kineto_results.events()
        if event.name() == "[memory]"
    )
    now = peak = allocated = 0
    for _, size in events:
        now += size
        peak = max(peak, now)
        allocated += max(size, 0)
    return Traffic(peak, allocated)


def _cuda_allocated(device: torch.device) -> int:
    allocated: int = torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"]
    return allocated


def saved_bytes(call: Callable[[], Tensor], model: nn.Module | None = None) -> int:
    """Bytes that a call's graph keeps for backward, each piece of memory counted once.

    Args:
        call: returns the loss.
        model: its parameters and buffers are not counted: they are there anyway.
    """
    own = set()
    if model is not None:
        tensors = (*model.parameters(), *model.buffers())
        own = {one.untyped_storage().data_ptr() for one in tensors}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = call()
    sizes = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in kept}
    del loss
    return sum(size for place, size in sizes.items() if place not in own)


def operations(call: Callable[[], object]) -> int:
    """How many operators a call dispatches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        count: int = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    counter = Counter()  # type: ignore[no-untyped-call]
    with counter:
        call()
    return counter.count
