"""Every kernel test runs on poisoned memory; its ``backend`` parameter is proved, not believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reft_kernels.testing import count_paths, poisoned_memory


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "traced: runs under torch.compile, which sees no patches")
    config.addinivalue_line("markers", "interpreter: what a GPU cannot do, such as float64 kernels")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cuda":
        skip = pytest.mark.skip(reason="not run: needs --device cpu")
        for item in items:
            if item.get_closest_marker("interpreter"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("traced"):
        yield
        return
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def ran(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """What ran, counted. A test with a ``backend`` parameter must have run it in the end and, but
    for the reference, nothing else; one that means nothing to run calls the parameter ``named``."""
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
            f"{backend} asked for, ran {counts}"
        )
        assert backend in used, f"{backend} was asked for and did not run"


class _NoSynchronisation(TorchDispatchMode):
    """Fails on every operator whose result, or its shape, the host has to wait for. ``tolist`` of a
    CPU tensor is no operator: only the meta device refuses it."""

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
