"""What several processes compute, once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from filelock import FileLock


@pytest.fixture(scope="session")
def ranks_folder(tmp_path_factory, worker_id) -> Path:
    """What ranks.py writes, and the same of one process, which it begins with."""
    from launch import torchrun
    from ranks import LONG
    from three_steps import CASES, make_base, make_trainer, trained

    root = tmp_path_factory.getbasetemp()
    folder = (root if worker_id == "master" else root.parent) / "ranks"
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
