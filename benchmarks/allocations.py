"""Allocations of a call: peak, total, and bytes that autograd saves; and its operators."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of a call: the peak of the memory in use, and the sum of all allocations."""

    peak: int
    allocated: int


def traffic(call: Callable[[], object], device: torch.device) -> Traffic:
    """Measure the allocations of a call; run it once before, so that caches are filled."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        in_use = torch.cuda.memory_allocated(device)
        before = _cuda_allocated(device)
        call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - in_use
        return Traffic(peak, _cuda_allocated(device) - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages of the profiler
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
    in_use = peak = allocated = 0
    for _, size in events:
        in_use += size
        peak = max(peak, in_use)
        allocated += max(size, 0)
    return Traffic(peak, allocated)


def _cuda_allocated(device: torch.device) -> int:
    allocated: int = torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"]
    return allocated


def saved_bytes(call: Callable[[], Tensor], model: nn.Module | None = None) -> int:
    """Bytes that autograd saves for the backward of a call; each storage is counted once.

    Args:
        call: returns the loss.
        model: parameters and buffers of this model are not counted.
    """
    weights = set()
    if model is not None:
        tensors = (*model.parameters(), *model.buffers())
        weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = call()
    storages = [tensor.untyped_storage() for tensor in saved]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del loss
    return sum(size for address, size in sizes.items() if address not in weights)


def operations(call: Callable[[], object]) -> int:
    """Number of operators that a call dispatches."""
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
