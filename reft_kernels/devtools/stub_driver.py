"""A Triton driver that launches nothing: kernels are compiled for a named GPU without having it.

CPU tensors stand for those of the GPU, so the library's own launcher runs unchanged: it chooses
settings, and Triton specialises and compiles. The driver records builds, with the seconds of each,
and launches, with the device that was current. Results are arbitrary memory.

Compiled and interpreted kernels cannot live in one process: TRITON_INTERPRET must be unset before
anything imports the kernels. A process that used this driver cannot launch kernels afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from reft_kernels import _triton, dispatch, functional
from reft_kernels.devtools.compile_report import TARGETS, check_target, register_wgmma


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: the kernel's name, the device that was current, and the grid."""

    kernel: str
    device: int
    grid: tuple[int, int, int]


@dataclass(slots=True)
class Journal:
    """The records of a driver.

    Attributes:
        builds: name of the kernel and CPU seconds of each build that was not in Triton's cache.
        register_wgmma: kernels with a wgmma whose left operand is in registers, see
            ``compile_report``.
        launches: the launches, in order.
    """

    builds: list[tuple[str, float]] = field(default_factory=list)
    register_wgmma: list[str] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)


class _Device:
    """The properties of a device: an H100's limits, and a binary that is never loaded."""

    @staticmethod
    def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024

    @staticmethod
    def unload_module(module: object) -> None:
        return None

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 232448,
            "multiprocessor_count": 132,
            "warpSize": 32,
            "max_num_regs": 65536,
        }


class StubDriver:
    """Triton's driver interface for ``target``; records launches in ``journal``."""

    def __init__(self, target: str, journal: Journal) -> None:
        self._target, self._journal = target, journal
        self.utils = _Device()

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return a launcher that records the launch."""

        def launch(x: int, y: int, z: int, *rest: object) -> None:
            name = getattr(metadata, "name", str(source))
            self._journal.launches.append(Launch(name, self.get_current_device(), (x, y, z)))

        return launch

    def get_current_device(self) -> int:
        """Return PyTorch's current device, like Triton's own driver; 0 without CUDA."""
        return torch.cuda.current_device() if torch.cuda.is_available() else 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS[self._target])

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        architecture = int(TARGETS[self._target][1])
        return architecture // 10, architecture % 10


@contextmanager
def launching_nothing(target: str = "cuda:90", device_name: str = "") -> Iterator[Journal]:
    """Send edits of CPU tensors within the block to the kernels, compiled for ``target``.

    Args:
        target: an NVIDIA target of ``reft_kernels.devtools.compile_report``.
        device_name: the device whose measured launch settings are used; empty for none.

    Raises:
        ValueError: an unknown target, or none of NVIDIA's.
        RuntimeError: Triton is not installed, or its kernels are interpreted.
    """
    check_target(target)
    if not target.startswith("cuda"):
        raise ValueError(f"target must be an NVIDIA target, cuda:…; got {target!r}")
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from reft_kernels._triton import launch

    journal = Journal()
    compiled: list[str] = []  # names of kernels that were not in the cache
    do_compile = JITFunction._do_compile

    def listener(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            compiled.append(src.name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        compiled.clear()
        began = _cpu_seconds()
        kernel = do_compile(*args, **kwargs)
        if compiled:
            journal.builds.append((compiled[-1], _cpu_seconds() - began))
        if register_wgmma(kernel.asm["ptx"]):
            journal.register_wgmma.append(kernel.metadata.name)
        return kernel

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", StubDriver(target, journal)))
        for patch in (
            mock.patch.object(_triton, "why_not", lambda device_type: None),
            mock.patch.object(functional, "choose", _triton_unless_named),
            mock.patch.object(launch, "target_of", lambda device: target),
            mock.patch.object(launch, "device_name", lambda device: device_name),
            mock.patch.object(JITFunction, "_do_compile", timed),
            mock.patch.object(knobs.compilation, "listener", listener),
        ):
            stack.enter_context(patch)
        yield journal


def _triton_unless_named(backend: str, *arguments: Any) -> dispatch.Choice:
    """Choose like on a GPU: "auto" uses the kernels if they can compute the edit."""
    if backend == "auto" and dispatch.why_not_triton(*arguments) is None:
        return dispatch.Choice("triton", "the tensors stand for those of a GPU")
    return dispatch.choose(backend, *arguments)


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the assemblers that it ran."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
