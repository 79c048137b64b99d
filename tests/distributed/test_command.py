"""``reft train`` started by torchrun and by accelerate launch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import ROOT, torchrun
from safetensors.torch import load_file
from tiny_models import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reft.cli.app import main

WORDS = [*"abcdefgh", *"0123456789", "yes", "no"]
SETTINGS = ("--rank", "2", "--positions", "f1+l1", "--steps", "4", "--save-steps", "2")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    code = left.value.code
    assert isinstance(code, int)
    return code


def arguments(place: Path, output: str, size: int) -> tuple[str, ...]:
    files = ("-m", str(place / "model"), "-d", str(place / "data.jsonl"))
    return (
        "train",
        *files,
        "-o",
        str(place / output),
        "--device",
        "cpu",
        "-b",
        str(size),
        *SETTINGS,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def place(made_once) -> Path:
    """A model and data; ``one`` and ``two``, the runs of one and of two processes; ``printed``, the
    output of the two."""

    def fill(folder: Path) -> None:
        words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
        ).save_pretrained(folder / "model")
        llama(initializer_range=0.1).save_pretrained(folder / "model")
        records = [
            {"prompt": " ".join(WORDS[i : i + 2 + i % 3]), "completion": WORDS[-1 - i % 2]}
            for i in range(16)
        ]
        (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
        printed = torchrun("-m", "reft", *arguments(folder, "two", 2))
        (folder / "printed").write_text(printed)
        assert run(*arguments(folder, "one", 4)) == 0

    return made_once("command", fill)


def test_two_processes_train_what_one_does(place):
    single, two = weights(place / "one"), weights(place / "two")
    assert single.keys() == two.keys()
    for name, value in single.items():
        assert float((value - two[name]).abs().max()) <= 1e-7, name


def test_one_of_them_speaks(place):
    printed = (place / "printed").read_text()
    assert printed.count("16 records; training") == 1
    assert printed.count("adapter written to") == 1
    assert printed.count("step 4:") <= 1


def test_one_process_resumes_what_two_began(place, tmp_path):
    shutil.copytree(place / "two", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    assert run(*arguments(place, str(tmp_path / "two"), 4), "--resume") == 0
    for name, value in weights(place / "two").items():
        assert float((value - weights(tmp_path / "two")[name]).abs().max()) <= 1e-7, name


def test_accelerate_launch_is_the_same_command(place, tmp_path):
    """accelerate starts one process on a CPU, whatever number is requested."""
    launch = (*(sys.executable, "-m", "accelerate.commands.launch"), "--cpu", "-m", "reft")
    subprocess.run(
        [*launch, *arguments(place, str(tmp_path / "launched"), 4)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    launched, single = weights(tmp_path / "launched"), weights(place / "one")
    assert launched.keys() == single.keys()
    assert all(torch.equal(value, launched[name]) for name, value in single.items())


@pytest.mark.parametrize("command", [("evaluate",), ("generate",), ("demo",), ("presets", "list")])
def test_other_commands_are_refused_by_several(monkeypatch, capfd, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(*command) == 2
    message = capfd.readouterr().err
    assert f"reft {command[0]} runs in one process, it was started in 2" in message


def test_a_preset_is_refused_by_several(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("train", "--preset", "paper-gsm8k") == 2
    assert "--preset runs in one process" in capfd.readouterr().err


def test_every_process_takes_its_own_device(monkeypatch):
    from reft.cli.loading import resolve_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("auto") == torch.device("cuda:3")


@pytest.mark.parametrize(("engine", "value"), [("FSDP", "true"), ("DEEPSPEED", "1")])
def test_a_base_to_be_sharded_waits_on_the_cpu(monkeypatch, engine, value):
    from reft.cli.ranks import shards_the_base

    assert not shards_the_base()
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "false")
    assert not shards_the_base()
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", value)
    assert shards_the_base()
