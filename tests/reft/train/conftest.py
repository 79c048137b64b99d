"""Fixtures of the training tests: a stopped run, trained once for each setting."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from trainer_runs import RUN, StopAt
from trl_runs import SETTINGS


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


@pytest.fixture
def spaced_records(color_records):
    """Records with spaces around the completions, because TRL concatenates texts."""
    return [{**record, "completion": f" {record['completion']} "} for record in color_records]


@pytest.fixture
def dpo(word_tokenizer, spaced_records, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig

    from reft import ReftDPOTrainer

    def build(model, folder="run", rows=None, tokenizer=word_tokenizer, **settings):
        pairs = [
            {"prompt": record["prompt"], "chosen": record["completion"], "rejected": " no no "}
            for record in spaced_records
        ]
        return ReftDPOTrainer(
            model,
            args=DPOConfig(str(tmp_path / folder), **{**SETTINGS, "beta": 0.5, **settings}),
            train_dataset=Dataset.from_list(rows or pairs),
            processing_class=tokenizer,
        )

    return build


@pytest.fixture
def kto(word_tokenizer, spaced_records, tmp_path):
    from datasets import Dataset
    from trl import KTOConfig

    from reft import ReftKTOTrainer

    def build(model, folder="run", **settings):
        rows = [{**record, "label": index % 3 > 0} for index, record in enumerate(spaced_records)]
        return ReftKTOTrainer(
            model,
            args=KTOConfig(str(tmp_path / folder), **{**SETTINGS, "beta": 0.5, **settings}),
            train_dataset=Dataset.from_list(rows),
            processing_class=word_tokenizer,
        )

    return build
