"""A pytest plugin that records which kernel builds the tests request.

``REFT_LAUNCHES=FILE pytest -p reft_kernels.devtools.launch_recorder tests/kernels`` runs the tests
in the interpreter. FILE gets one JSON object for each build that a GPU would have to compile: the
values that Triton specialises a kernel on, and the first test that requested it. :func:`replay`
launches it. Tests that only a GPU runs are skipped; if they have a ``case``, the case is written,
and replayed.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reft_kernels.devtools.testing import PARAMETERS, Case, make_edit, run_edit
from reft_kernels.functional import lowrank_edit

#: Triton distinguishes the integer 1, multiples of 16, and other integers.
_ONE, _SIXTEEN, _OTHER = 1, 16, 17


class _RecordedKernel:
    """A kernel that records the values that each launch specialises it on."""

    def __init__(self, name: str, kernel: Any, seen: dict[str, str]) -> None:
        self._name, self._kernel, self._seen = name, kernel, seen

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Any:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
            self._seen.setdefault(json.dumps(described(self._name, arguments, constants)), test)
            return self._kernel[grid](*arguments, **constants)

        return launch


def described(name: str, arguments: tuple[Any, ...], constants: dict[str, Any]) -> dict[str, Any]:
    """Describe a launch by the values that determine its build: of tensors, dtype and alignment."""
    return {
        "kernel": name,
        "arguments": [
            [str(value.dtype).removeprefix("torch."), value.data_ptr() % 16 == 0]
            if isinstance(value, Tensor)
            else _ONE
            if value == 1
            else _OTHER
            if value % 16
            else _SIXTEEN
            for value in arguments
        ],
        "constants": {
            key: value if isinstance(value, (bool, int, str)) else str(value)
            for key, value in constants.items()
        },
    }


def replay(launch: dict[str, Any]) -> None:
    """Launch a record of :func:`described` on tensors of a few elements, or run a case.

    Only for a driver that launches nothing.
    """
    import triton.language as tl

    from reft_kernels._triton import launch as launcher

    if "case" in launch:
        fields = launch["case"] | {"groups": tuple(launch["case"]["groups"])}
        case = Case(**fields | {"dtype": getattr(torch, fields["dtype"])})
        edit = make_edit(case)
        for wants in ((), ("hidden", *PARAMETERS)):
            run_edit(lowrank_edit, edit, wants=wants, backend="triton")
        return
    arguments: list[int | Tensor] = []
    for argument in launch["arguments"]:
        if isinstance(argument, int):
            arguments.append(argument)
        else:
            dtype, aligned = argument
            memory = torch.empty(64, dtype=getattr(torch, dtype))
            arguments.append(memory if aligned else memory[1:])
    sums = {str(dtype): dtype for dtype in (tl.float32, tl.float64)}
    constants = launch["constants"] | {"ACC": sums[launch["constants"]["ACC"]]}
    getattr(launcher, launch["kernel"])[1,](*arguments, **constants)


def record() -> dict[str, str]:
    """Replace the kernels by recorders.

    Returns:
        A launch as JSON -> the first test that requested it; filled as the kernels are launched.
    """
    from reft_kernels._triton import launch

    seen: dict[str, str] = {}
    for name, kernel in list(vars(launch).items()):
        if name.endswith("_kernel"):
            setattr(launch, name, _RecordedKernel(name, kernel, seen))
    return seen


def pytest_configure(config: Any) -> None:
    """Start recording."""
    config.launches = record()


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Record the cases of tests that only a GPU runs."""
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if isinstance(case, Case) and item.get_closest_marker("gpu"):
            fields = dataclasses.asdict(case) | {"dtype": str(case.dtype).removeprefix("torch.")}
            config.launches[json.dumps({"case": fields})] = item.nodeid


def pytest_unconfigure(config: Any) -> None:
    """Append the records of this process to the file."""
    if config.launches:
        with Path(os.environ["REFT_LAUNCHES"]).open("a", encoding="utf-8") as file:
            for launch, test in config.launches.items():
                file.write(json.dumps(json.loads(launch) | {"test": test}) + "\n")
