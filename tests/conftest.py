"""``--device cpu`` (the default) runs the Triton kernels in Triton's interpreter, ``--device cuda``
on the GPU."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

import pytest

# pytest has put this folder on the path, from where tests/vllm looks like the package vllm.
sys.path[:] = [one for one in sys.path if one != str(Path(__file__).parent)]


def _device_asked_for() -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    return parser.parse_known_args()[0].device


# Triton reads the switch when it is imported, which the next conftest may do: so here, not in a
# hook. Workers of pytest-xdist have no arguments and inherit the environment.
if "PYTEST_XDIST_WORKER" not in os.environ:
    if _device_asked_for() == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        # Without a fixed workspace cuBLAS refuses to be deterministic. Read when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cpu: the kernels are interpreted (default). cuda: they are compiled and run.",
    )


def pytest_configure(config: pytest.Config) -> None:
    asked, interpreted = config.getoption("--device"), os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted != (asked == "cpu"):
        raise pytest.UsageError(
            f"--device {asked} with TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')}: "
            "give --device on the command line"
        )
    if asked == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no CUDA device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        for item in items:
            if marker := item.get_closest_marker("gpu"):
                reason = marker.args[0] if marker.args else "the interpreter cannot judge it"
                item.add_marker(pytest.mark.skip(reason=f"not run: needs --device cuda, {reason}"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest):
    """The device that tensors of a kernel test are made on."""
    import torch

    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def _unfreeze_at_the_end():
    yield
    gc.unfreeze()  # what is frozen at exit is reported as leaked


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_collect(_unfreeze_at_the_end) -> None:
    """Hide the objects of imports from the garbage collector: every ``Trainer.train`` calls
    ``gc.collect()``, which would walk through them all."""
    gc.collect()
    gc.freeze()
