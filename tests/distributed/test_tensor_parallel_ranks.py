"""Two processes under tensor parallelism train and generate like one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import tp_worker
from launch import torchrun
from three_steps import collate, features, largest_difference
from tp_worker import (
    CASES,
    KNOWS_SPLIT,
    QUANTIZED,
    SLICES,
    TRAINER,
    adapted,
    load,
    quantized,
    steps,
    texts,
    with_trainer,
)

from reft import ReftConfig, ReftModel, get_reft_model

NEEDS_TRAINER = pytest.mark.skipif(
    not KNOWS_SPLIT, reason="this Trainer does not know what from_pretrained has split"
)


@pytest.fixture(scope="module")
def folder(made_once) -> Path:
    """Files that two processes have written."""

    def fill(folder: Path) -> None:
        tp_worker.bases(folder)
        sliced = get_reft_model(load(folder, {}), ReftConfig(rank=2, component=SLICES[0]))
        sliced.save_pretrained(folder / "sliced")
        torchrun(tp_worker.__file__, folder)

    return made_once("tensor-parallel", fill)


def load_results(folder: Path, scene: str) -> list[dict[str, Any]]:
    """Load the results of each rank."""
    return [torch.load(folder / f"{scene}.{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_three_steps_equal_one_process(name, folder):
    case = CASES[name]
    alone = steps(adapted(load(folder, case), case), case)
    assert min(tensor.abs().max() for tensor in alone["gradients"].values()) > 1e-6
    first, second = load_results(folder, name)
    # Nothing synchronises the ranks, so they must stay equal bit for bit.
    assert largest_difference(first["weights"], second["weights"]) == 0
    close = 1e-6 if name == "float32" else 1e-13
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=0, atol=close)
    for what in ("gradients", "weights"):
        assert largest_difference(first[what], alone[what]) <= close, what


@NEEDS_TRAINER
@pytest.mark.parametrize("name", TRAINER)
def test_the_trainer_equals_one_process(name, folder):
    alone = with_trainer(folder, name)
    for result in load_results(folder, f"trainer-{name}"):
        assert largest_difference(result["weights"], alone["weights"]) <= 1e-7
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-6)


def test_generation_equals_one_process(folder):
    model = adapted(load(folder, {}), {})
    steps(model, {})
    expected = texts(model)
    with model.disable_adapter():
        plain = texts(model)
    assert not torch.equal(plain[0], expected[0])
    for result in (*load_results(folder, "texts"), *load_results(folder, "loaded")):
        for got, want in zip(result["texts"], expected, strict=True):
            assert torch.equal(got, want)


def test_what_was_saved_is_read_in_one_process(folder):
    """Rank 0 saves the complete adapter."""
    model = ReftModel.from_pretrained(load(folder, {}), folder / "saved")
    for got, want in zip(texts(model), load_results(folder, "texts")[0]["texts"], strict=True):
        assert torch.equal(got, want)


def test_unload_gives_the_split_base_back(folder):
    with torch.no_grad():
        expected = load(folder, {})(**collate(features(4))).logits
    for result in load_results(folder, "base"):
        torch.testing.assert_close(result["logits"], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("component", SLICES)
def test_a_slice_is_refused(component, folder):
    for errors in load_results(folder, "refusals"):
        assert errors[component].startswith(
            f"ReftConfig.component must not be {component!r} of block 0, a LlamaDecoderLayer, "
            "under tensor parallelism over 2 processes: "
        )
        allowed = errors[component].split("allowed: ")[1].split(", ")
        assert {"block_output", "attention_output", "mlp_output"} < {*allowed}
        assert {"module:self_attn.o_proj", "module:mlp.down_proj"} < {*allowed}
        assert not {*SLICES} & {*allowed}


@pytest.mark.parametrize("door", ["from_pretrained", "add_adapter", "load_adapter", "pool"])
def test_a_slice_is_refused_at_every_door(door, folder):
    for errors in load_results(folder, "refusals"):
        assert f"ReftConfig.component must not be {SLICES[0]!r}" in errors[door]


def test_a_base_that_torch_has_split(folder):
    """Without transformers' plan, only outputs added to the residual stream are known to be
    replicated."""
    case = CASES["mlp"]
    alone = steps(adapted(load(folder, case), case), case)
    for result in load_results(folder, "foreign"):
        assert largest_difference(result["weights"], alone["weights"]) <= 1e-13


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "head": "ReftConfig.modules_to_save must not name 'lm_head' here: tensor parallelism has "
        "split its weight",
        "sharded head": "ReftConfig.modules_to_save must not name 'lm_head' here: FSDP2 has split",
        "pipeline": "base_model must not be under pipeline parallelism",
        "sequence": "base_model must not be under sequence parallelism",
        "foreign": "ReftConfig.component must not be 'module:mlp.up_proj'",
        "context": "an adapter must not be active inside torch's context_parallel",
    }.items(),
)
def test_what_cannot_be_right_is_refused(name, message, folder):
    for result in load_results(folder, "refusals"):
        assert result[name].startswith(message)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_base_in_4_bits_under_ddp(name, folder):
    alone = quantized(folder, name)
    assert min(float(tensor.abs().max()) for tensor in alone["gradients"][0].values()) > 1e-4
    for result in load_results(folder, f"quantized-{name}"):
        assert result["kind"] == "DistributedDataParallel"
        for got, want in zip(result["gradients"], alone["gradients"], strict=True):
            assert largest_difference(got, want) <= 1e-6
        assert largest_difference(result["weights"], alone["weights"]) <= 1e-7


@NEEDS_TRAINER
def test_a_trainer_refuses_what_it_does_not_know_to_be_split(folder):
    for result in load_results(folder, "refusals"):
        assert result["foreign trainer"].startswith("model must not be sharded before the Trainer")
