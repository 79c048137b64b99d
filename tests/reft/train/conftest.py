"""Fixtures of the training tests: a stopped run, trained once for each setting."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from trainer_runs import RUN, StopAt


@pytest.fixture(scope="session")
def _stopped_runs(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    return tmp_path_factory.mktemp("stopped-runs"), {}


@pytest.fixture
def stopped_run(make_trainer, tmp_path, _stopped_runs):
    """A function that returns the checkpoint in ``run`` of a run stopped after two of four steps;
    its arguments go to ``make_trainer``."""
    root, trained = _stopped_runs

    def checkpoint(**changes) -> Path:
        folder, key = tmp_path / "run", repr(sorted(changes.items()))
        if key in trained:
            shutil.copytree(trained[key], folder, dirs_exist_ok=True)
        else:
            trainer = make_trainer("run", **{**RUN, **changes})
            trainer.add_callback(StopAt(2))
            trainer.train()
            trainer.model.unload()
            trained[key] = Path(shutil.copytree(folder, root / str(len(trained))))
        return folder / "checkpoint-2"

    return checkpoint
