"""Results of several processes, computed once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def ranks_folder(made_once) -> Path:
    """Files that ``ranks.py`` writes, and the same of one process, which runs first."""
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
