"""What several processes compute, once for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all workers of this test run have."""
    root: Path = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def ranks_folder(shared) -> Path:
    """What ranks.py writes, and the same of one process, which it begins with."""
    from launch import torchrun
    from ranks import LONG
    from three_steps import CASES, make_base, make_trainer, trained

    folder = shared / "ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            making = folder.with_name("making-ranks")
            making.mkdir()
            make_base().save_pretrained(making / "base")
            for name, case in (CASES | LONG).items():
                trainer = make_trainer(case, making / "runs" / "one" / name)
                torch.save(trained(trainer), making / f"one.{name}.pt")
            torchrun(Path(__file__).with_name("ranks.py"), making)
            making.rename(folder)
    return folder
