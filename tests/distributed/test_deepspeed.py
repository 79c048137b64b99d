"""Training on two ranks under DeepSpeed, ZeRO 0 to 3, equals training in one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import torchrun
from safetensors.torch import load_file
from three_steps import CASES, Case, largest_difference, make_base, make_trainer, trained

from reft import ReftModel
from reft.train.deepspeed import check_checkpoint

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("not run: needs deepspeed", allow_module_level=True)

from deepspeed_worker import LONG, MORE, SAVED, STAGES, outputs, weights

BOTH = [(stage, name) for stage, names in STAGES.items() for name in names]


@pytest.fixture(scope="module")
def folder(made_once) -> Path:
    """Files that two ranks have written."""

    def fill(folder: Path) -> None:
        make_base().save_pretrained(folder / "base")
        torchrun(Path(__file__).with_name("deepspeed_worker.py"), folder)

    return made_once("deepspeed", fill)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function of a case's name and more arguments that trains it in one process."""
    made: dict[Any, dict[str, Any]] = {}

    def of(name: str, **arguments: Any) -> dict[str, Any]:
        key = (name, *arguments)
        if key not in made:
            case = (CASES | MORE)[name]
            case = Case({**case.arguments, **arguments}, case.config, case.lora)
            trainer = make_trainer(case, tmp_path_factory.mktemp("alone"))
            made[key] = {**trained(trainer), "model": trainer.model}
        return made[key]

    return of


def load_results(folder: Path, stage: int, scene: str) -> dict[str, Any]:
    result = torch.load(folder / f"{stage}-{scene}.pt")
    if "unsupported" in result:
        assert "cannot import name" in result["unsupported"]
        pytest.skip(result["unsupported"])
    return result


@pytest.mark.parametrize(("stage", "name"), BOTH)
def test_three_steps_equal_one_process(stage, name, folder, alone):
    result, expected = load_results(folder, stage, name), alone(name)
    assert result["engine"] == "DeepSpeedEngine"
    assert bool(result["shards"]) == (stage == 3)
    assert largest_difference(result["weights"], expected["weights"]) <= 1e-7
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-6)


@pytest.mark.parametrize("stage", SAVED)
def test_generation_equals_one_process(stage, folder, alone):
    result, model = load_results(folder, stage, "saved"), alone("plain")["model"]
    texts, logits = outputs(model)
    assert all(map(torch.equal, result["texts"], texts))
    torch.testing.assert_close(result["logits"], logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", ["model", "adapter"])
@pytest.mark.parametrize("stage", SAVED)
def test_what_is_saved_is_the_adapter_and_whole(stage, what, folder, alone):
    saved = folder / f"{stage}-{what}"
    assert not [*saved.glob("global_step*")]
    model = ReftModel.from_pretrained(make_base(), saved)
    expected = load_results(folder, stage, "saved")["weights"]
    values = load_file(saved / "adapter_model.safetensors")
    for name in ("weight", "bias"):
        assert torch.equal(values[name], expected[f"reft.adapters.default.{name}"])
    texts, _ = outputs(model)
    assert all(map(torch.equal, texts, load_results(folder, stage, "saved")["texts"]))


@pytest.mark.parametrize(("stage", "name"), [(2, "plain"), (3, "lora")])
def test_a_resumed_run_ends_in_the_same_bits(stage, name, folder, alone):
    whole, again = (
        load_results(folder, stage, f"{name}-{run}")["weights"] for run in ("long", "again")
    )
    assert largest_difference(whole, again) == 0
    assert largest_difference(whole, alone(name, **LONG)["weights"]) <= 1e-7


@pytest.mark.parametrize(("stage", "name"), [(2, "plain"), (3, "lora")])
def test_checkpoints_do_not_hold_the_base(stage, name, folder):
    checkpoint = folder / "runs" / f"{stage}-{name}-long" / "checkpoint-2"
    states = [*checkpoint.glob("global_step*/*model_states.pt")]
    assert states
    for file in states:
        module = torch.load(file, weights_only=False)["module"]
        assert module
        assert all(".adapters." in key or ".lora_" in key for key in module), [*module]


def test_a_checkpoint_is_not_resumed_without_deepspeed(folder, tmp_path):
    """The adapter in it can be loaded anywhere."""
    checkpoint = folder / "runs" / "2-plain-long" / "checkpoint-2"
    trainer = make_trainer(Case(LONG), tmp_path)
    before = weights(trainer.model)
    with pytest.raises(ValueError, match="written with DeepSpeed: resume it with DeepSpeed, on as"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert largest_difference(weights(trainer.model), before) == 0
    ReftModel.from_pretrained(make_base(), checkpoint, is_trainable=True)
    with pytest.raises(ValueError, match="written without DeepSpeed: resume it without"):
        check_checkpoint(str(tmp_path), under_deepspeed=True)


@pytest.mark.parametrize("stage", [2, 3])
def test_bfloat16_is_not_what_is_saved(stage, folder, alone):
    """The saved adapter has the optimizer's float32 values; the modules hold them rounded."""
    saved = load_file(folder / f"{stage}-half-adapter" / "adapter_model.safetensors")
    held = load_results(folder, stage, "half")["weights"]
    expected = alone("plain")["weights"]
    for name in ("weight", "bias"):
        key = f"reft.adapters.default.{name}"
        assert (saved[name].dtype, held[key].dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(saved[name].bfloat16(), held[key])
        assert not torch.equal(saved[name], held[key].float())
        torch.testing.assert_close(saved[name], expected[key], rtol=0.02, atol=5e-3)
    model = ReftModel.from_pretrained(make_base(), folder / f"{stage}-half-adapter")
    assert model.orthonormality_error() < 1e-5


def test_a_base_that_was_loaded_in_parts(folder, alone):
    """The head, of which the adapter trains a copy, is sharded as well."""
    result = load_results(folder, 3, "head-loaded")["weights"]
    assert largest_difference(result, alone("head")["weights"]) <= 1e-7
