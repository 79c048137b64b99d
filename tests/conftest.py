"""``--device cpu`` (the default) runs the Triton kernels in Triton's interpreter, ``--device cuda``
on the GPU."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# pytest has put this folder on the path, where tests/vllm would hide the package vllm.
sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]


def _requested_device() -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    return parser.parse_known_args()[0].device


# Triton reads this variable when it is imported, which the next conftest may do: set it here, not
# in a hook. Workers of pytest-xdist have no arguments and inherit the environment.
if "PYTEST_XDIST_WORKER" not in os.environ:
    if _requested_device() == "cpu":
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
    requested, interpreted = (
        config.getoption("--device"),
        os.environ.get("TRITON_INTERPRET") == "1",
    )
    if interpreted != (requested == "cpu"):
        raise pytest.UsageError(
            f"--device {requested} with TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')}: "
            "give --device on the command line"
        )
    if requested == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no CUDA device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        for item in items:
            if marker := item.get_closest_marker("gpu"):
                reason = marker.args[0] if marker.args else "the interpreter cannot judge it"
                item.add_marker(pytest.mark.skip(reason=f"not run: needs --device cuda, {reason}"))


@pytest.fixture(scope="module", autouse=True)
def _freeze_imports() -> None:
    """Exclude imported modules and collected tests from garbage collection. Every training starts
    with ``gc.collect()``, which took half of a training test's time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Undo the freezing: frozen objects are reported as leaks when Python exits."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function of a name and of a function that fills a folder: the first worker that asks for
    the name fills the folder, all workers read it."""
    root: Path = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def folder(name: str, fill: Callable[[Path], None]) -> Path:
        from filelock import FileLock

        with FileLock(root / f"{name}.lock"):
            if not (root / name).exists():
                making = root / f"making-{name}"
                making.mkdir()
                fill(making)
                making.rename(root / name)
        return root / name

    return folder


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest):
    """Device of the tensors of a kernel test."""
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
