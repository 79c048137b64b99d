"""Hostile training checkpoints: damaged, with code, or of a diverged run."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from payloads import Harmful
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import llama, tokens
from torch import nn
from transformers import TrainingArguments
from witnesses import assert_same, state_of

from reft import ReftConfig, ReftTrainer, get_reft_model

NAN = float("nan")


def trainer_of(folder: Path, steps: int, make: Callable[[], nn.Module] = llama) -> ReftTrainer:
    torch.manual_seed(1)
    rows = tokens(4, 6).tolist()
    records = [{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in rows]
    return ReftTrainer(
        get_reft_model(make(), ReftConfig(rank=2, positions="f2+l2")),
        TrainingArguments(
            output_dir=str(folder), max_steps=steps, save_steps=2, save_strategy="steps",
            per_device_train_batch_size=2, report_to="none", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=records,
        data_collator=lambda rows: {key: torch.tensor([r[key] for r in rows]) for key in rows[0]},
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Train two steps and return the checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    trainer_of(folder, 2).train()
    return folder / "checkpoint-2"


@pytest.fixture
def run(trained, tmp_path) -> tuple[ReftTrainer, Path]:
    """Make a trainer with its initial model, and a checkpoint to resume from."""
    checkpoint = shutil.copytree(trained, tmp_path / "run" / "checkpoint-2")
    return trainer_of(checkpoint.parent, 4), checkpoint


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        with safe_open(file, framework="pt") as stored:
            kept, tensors = stored.metadata(), {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
        save_file({**tensors, name: change(tensors[name])}, file, metadata=kept)

    return apply


def optimizer_of_nan(folder: Path) -> None:
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    state["state"][0]["exp_avg"] += NAN
    torch.save(state, folder / "optimizer.pt")


def pipe(folder: Path) -> None:
    (folder / "optimizer.pt").unlink()
    os.mkfifo(folder / "optimizer.pt")


def code(name: str) -> Callable[[Path], None]:
    return lambda folder: torch.save({"state": Harmful()}, folder / name)


#: Checkpoint -> (change, text of the error)
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "code in the optimizer": (code("optimizer.pt"), r"optimizer\.pt is damaged or holds code"),
    "code in the scheduler": (code("scheduler.pt"), r"scheduler\.pt is damaged or holds code"),
    "code in random numbers": (code("rng_state.pth"), r"rng_state\.pth is damaged or holds code"),
    "a scaler with code": (code("scaler.pt"), r"scaler\.pt is damaged or holds code"),
    "half an optimizer": (
        lambda f: (f / "optimizer.pt").write_bytes((f / "optimizer.pt").read_bytes()[:500]),
        r"optimizer\.pt is damaged",
    ),
    "a pipe": (pipe, r"optimizer\.pt must be a plain file"),
    "an optimizer of NaN": (optimizer_of_nan, r"state\.0\.exp_avg holds NaN.*had diverged"),
    "a state of no object": (
        lambda f: (f / "trainer_state.json").write_text("[]"),
        r"trainer_state\.json must hold a JSON object",
    ),
    "a deep state": (
        lambda f: (f / "trainer_state.json").write_text("[" * 10**5),
        "nested too deep|trainer_state",
    ),
    "W of NaN": (tensor("weight", lambda t: t * NAN), "weight must be finite.*had diverged"),
    "free of NaN": (tensor("rotation.free", lambda t: t * NAN), "rotation.free must be .*diverged"),
    "base of NaN": (tensor("rotation.base", lambda t: t * NAN), "rotation.base must be .*diverged"),
    "another base": (tensor("rotation.base", lambda t: t * 5), "must give the rotation"),
    "another R": (tensor("rotation", lambda t: t.flip(2).clone()), "must give the rotation"),
    "free of another shape": (
        tensor("rotation.free", lambda t: t[..., :1].clone()), "rotation.free must have shape"),
    "another configuration": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes().replace(b"f2+l2", b"f2+l1")),
        "of the same configuration; it has positions = 'f2.l1'",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*disagree")
@pytest.mark.parametrize("name", REFUSED)
def test_resuming_is_refused_and_nothing_was_restored(name, run, marker):
    change, words = REFUSED[name]
    trainer, checkpoint = run
    change(checkpoint)
    before = state_of(trainer.model)
    with pytest.raises(ValueError) as caught:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert re.search(words, str(caught.value)), str(caught.value)[:600]
    assert str(checkpoint) in str(caught.value)
    after = state_of(trainer.model)
    # Only the training mode may differ, because Trainer has prepared the model before.
    modes = [{k: v[0] for k, v in state["modules"].items()} for state in (before, after)]
    assert_same({**before, "modules": modes[0]}, {**after, "modules": modes[1]})
    assert not marker.exists()


def test_training_arguments_are_never_unpickled(run, marker):
    trainer, checkpoint = run
    torch.save(Harmful(), checkpoint / "training_args.bin")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 4
    assert not marker.exists()


def test_restore_alone(run, marker, tmp_path):
    """``ReftModel.restore`` reads only the adapter of a checkpoint."""
    trainer, checkpoint = run
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save(Harmful(), checkpoint / name)
    trainer.model.restore(checkpoint)
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    tensor("bias", lambda value: value / 0)(broken)
    before = state_of(trainer.model)
    with pytest.raises(ValueError, match="bias must be finite"):
        trainer.model.restore(broken)
    assert_same(before, state_of(trainer.model))
    assert not marker.exists()
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["global_step"] == 2


@pytest.mark.parametrize("damage", ["cut", "nan", "missing"])
def test_a_damaged_file_of_peft_changes_nothing(damage, tmp_path):
    """Neither PEFT's adapter nor ours, which is read first, is changed."""
    peft = pytest.importorskip("peft")

    def with_lora() -> nn.Module:
        return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))

    trainer_of(tmp_path, 2, with_lora).train()
    checkpoint = tmp_path / "checkpoint-2"
    file = checkpoint / "lora" / "adapter_model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "nan":
        tensors = load_file(file)
        tensors[next(iter(tensors))][0, 0] = NAN
        save_file(tensors, file)
    else:
        file.unlink()
    again = trainer_of(tmp_path, 4, with_lora)
    before = state_of(again.model)["values"]
    with pytest.raises((ValueError, FileNotFoundError), match="lora"):
        again.train(resume_from_checkpoint=str(checkpoint))
    after = state_of(again.model)["values"]
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
