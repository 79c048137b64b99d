"""Rules of kernel tests: each declares where it runs, and runs on poisoned memory and inexact
matrix units; the backend named by its ``backend`` parameter is verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reft_kernels._triton import why_not
from reft_kernels.devtools.testing import count_paths, poisoned_memory


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "traced: runs under torch.compile, which sees no patches",
        "host(reason): runs on the CPU whatever --device is (of a module: tests without `device`)",
        "interpreter(reason): what a GPU cannot do, such as float64 kernels, or need not do again",
    ):
        config.addinivalue_line("markers", line)


@pytest.hookimpl(tryfirst=True)  # before any is deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    undecided = {item.nodeid.split("[")[0] for item in here if not _declares_where_it_runs(item)}
    if undecided:
        raise pytest.UsageError(
            "a kernel test takes the fixture `device` or has a marker gpu, host(reason) or "
            "interpreter(reason); these do not:\n" + "\n".join(sorted(undecided))
        )
    if config.getoption("--device") == "cuda":
        for item in here:
            if marker := _on_the_cpu(item):
                reason = f"not run with --device cuda: {marker.args[0]}"
                item.add_marker(pytest.mark.skip(reason=reason))


def _on_the_cpu(item: pytest.Item) -> pytest.Mark | None:
    """Return the marker that keeps a test from a GPU, or None."""
    host = None if _on_a_gpu(item) else item.get_closest_marker("host")
    return item.get_closest_marker("interpreter") or host


def _declares_where_it_runs(item: pytest.Item) -> bool:
    marker = _on_the_cpu(item)
    return _on_a_gpu(item) if marker is None else bool(marker.args)


def _on_a_gpu(item: pytest.Item) -> bool:
    """Whether a test uses the device of --device, or requires a GPU."""
    return "device" in getattr(item, "fixturenames", ()) or bool(item.get_closest_marker("gpu"))


@pytest.fixture(scope="module", autouse=True)
def _inexact_products() -> Iterator[None]:
    """Interpreted matrix products are as inexact as Hopper's."""
    if why_not("cpu") is not None:
        yield
        return
    from matrix_units import hopper_products

    with hopper_products():
        yield


@pytest.fixture(autouse=True)
def _poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("traced"):
        yield
        return
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def ran(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """Count the calls of each path.

    A test with a ``backend`` parameter must run that backend and, except for the reference, no
    other one. A test that may run nothing calls the parameter ``named``.
    """
    if request.node.get_closest_marker("traced"):
        yield Counter()
        return
    with count_paths() as counts:
        yield counts
    callspec = getattr(request.node, "callspec", None)
    backend = None if callspec is None else callspec.params.get("backend")
    if backend is not None:
        used = {name.split(".")[0] for name in counts}
        assert used - {"reference"} == {backend} - {"reference"}, (
            f"{backend} was requested, but ran {counts}"
        )
        assert backend in used, f"{backend} was requested and did not run"


class _NoSynchronisation(TorchDispatchMode):
    """Fail on every operator whose result, or its shape, the host has to wait for.

    ``tolist`` of a CPU tensor is not an operator: only the meta device refuses it.
    """

    _WAITS = frozenset(
        {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"}
        | {"nonzero", "masked_select", "bincount", "unique_consecutive", "unique_dim", "_unique2"}
    )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for argument in args[1:2]
            if isinstance(argument, (list, tuple))
            for index in argument
        )
        if name in self._WAITS or masks:
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_synchronisation() -> type[TorchDispatchMode]:
    """A context in which nothing may wait for the device."""
    return _NoSynchronisation
