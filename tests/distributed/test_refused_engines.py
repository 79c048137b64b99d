"""Engines that give a rank some of the tokens, or other modules, are refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from three_steps import CASES, make_trainer
from transformers import Trainer

from reft.train.deepspeed import check_parallelism

ENGINES = {
    "ParallelismConfig.cp_size": ({"cp_size": 2, "sp_size": 1}, None),
    "ParallelismConfig.sp_size": ({"sp_size": 2}, None),
    "DeepSpeed's sequence_parallel_size": ({}, {"sequence_parallel_size": 2}),
    "DeepSpeed's tensor_parallel.autotp_size": ({}, {"tensor_parallel": {"autotp_size": 2}}),
}


def accelerator(sizes, config):
    plugin = None if config is None else SimpleNamespace(deepspeed_config=config)
    return SimpleNamespace(
        parallelism_config=SimpleNamespace(**sizes) if sizes else None,
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name} must be 1, got 2: "):
        check_parallelism(accelerator(*ENGINES[name]))


def test_a_trainer_refuses_it_when_it_is_made(monkeypatch, tmp_path):
    def create_accelerator(trainer):
        trainer.accelerator = accelerator({"cp_size": 2}, None)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create_accelerator)
    with pytest.raises(ValueError, match=r"^ParallelismConfig\.cp_size must be 1, got 2: "):
        make_trainer(CASES["plain"], tmp_path)


def test_what_shards_data_and_parameters_is_not():
    check_parallelism(
        accelerator({"cp_size": 1, "sp_size": 1, "tp_size": 2, "dp_shard_size": 2}, {})
    )
    check_parallelism(accelerator({}, {"zero_optimization": {"stage": 3}, "tensor_parallel": {}}))
