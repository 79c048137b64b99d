"""What several processes compute, once for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A function of a name and of what fills a folder; all workers of this test run get one."""
    root: Path = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def folder(name: str, fill: Callable[[Path], None]) -> Path:
        with FileLock(root / f"{name}.lock"):
            if not (root / name).exists():
                making = root / f"making-{name}"
                making.mkdir()
                fill(making)
                making.rename(root / name)
        return root / name

    return folder


@pytest.fixture(scope="session")
def ranks_folder(made_once) -> Path:
    """What ranks.py writes, and the same of one process, which it begins with."""
    from launch import torchrun
    from ranks import LONG
    from three_steps import CASES, make_base, make_trainer, trained

    def fill(folder: Path) -> None:
        make_base().save_pretrained(folder / "base")
        for name, case in (CASES | LONG).items():
            trainer = make_trainer(case, folder / "runs" / "one" / name)
            torch.save(trained(trainer), folder / f"one.{name}.pt")
        torchrun(Path(__file__).with_name("ranks.py"), folder)

    return made_once("ranks", fill)
