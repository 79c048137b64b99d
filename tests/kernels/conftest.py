"""Every kernel test runs on poisoned memory, and its ``backend`` parameter is proved, not believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

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
    """What ran, counted; afterwards a test with a ``backend`` parameter must have run it and, but for
    the reference, nothing else. A test that means nothing to run clears ``ran.expected``."""
    if request.node.get_closest_marker("traced"):
        yield Counter()
        return
    with count_paths() as counts:
        yield counts
    callspec = getattr(request.node, "callspec", None)
    backend = None if callspec is None else callspec.params.get("backend")
    if backend is not None:
        used = {name.split(".")[0] for name in counts}
        assert used - {"reference"} == {backend} - {"reference"}, f"{backend} asked for, ran {counts}"
        assert backend in used, f"{backend} was asked for and did not run"
