"""`reft train --resume`: interrupted runs, and settings that differ from the checkpoint's."""

from __future__ import annotations

import json

import pytest
import torch

from reft.io.adapter_files import read_adapter

TRAIN = {"-m": "model", "-d": "data.jsonl", "-o": "out", "--device": "cpu", "--rank": "2"}
TRAIN |= {"--steps": "4", "--save-steps": "2", "--lr": "0.01", "--batch-size": "4"}


def command(*flags, **changed):
    given = TRAIN | {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    return ("train", *(part for pair in given.items() for part in pair), *flags)


@pytest.fixture
def begun(place, reft):
    """Make a run of four steps that was killed after its second checkpoint, without an adapter."""
    assert reft(*command())[0] == 0
    (place / "undisturbed").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (place / "out" / name).rename(place / "undisturbed" / name)
    return place


def stored(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("more", [(), ("--eval-data", "data.jsonl")], ids=["plain", "evaluated"])
def test_a_run_with_nothing_left_says_so_and_writes_its_adapter(begun, reft, more):
    code, out, err = reft(*command("--resume", *more))
    assert code == 0, err
    assert out.startswith("no step was trained, out/checkpoint-4 has all 4 steps of this run")
    assert out.endswith("; adapter written to out\n")
    assert "train loss" not in out
    assert ("eval loss" in out) == bool(more)
    expected, resumed = (read_adapter(begun / name)[1] for name in ("undisturbed", "out"))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_a_run_with_steps_left_goes_on(begun, reft):
    code, out, err = reft(*command("--resume", steps="6"))
    assert code == 0, err
    assert out.startswith("train loss ")
    assert "no step" not in out
    assert (begun / "out" / "checkpoint-6").is_dir()


CHANGES = {
    "rate": ({"lr": "0.02"}, ["learning_rate was 0.01, is 0.02"]),
    "fewer-steps": ({"steps": "3"}, ["4 steps", "3"]),
    "fewer-records": ({"-d": "few.jsonl"}, ["12", "8"]),
    "other-records": ({"-d": "other.jsonl"}, ["training data differ"]),
    "two": ({"lr": "0.02", "schedule": "cosine"}, ["learning_rate", "lr_scheduler_type"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_refused_in_one_line_unless_it_is_allowed(
    begun, reft, color_records, change
):
    changed, says = CHANGES[change]
    for name, records in (
        ("few", color_records[:8]),
        ("other", [{**record, "completion": "red"} for record in color_records]),
    ):
        (begun / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = {name: value for name, value in changed.items() if name != "-d"}
    arguments = list(command("--resume", **options))
    if "-d" in changed:
        arguments[arguments.index("-d") + 1] = changed["-d"]
    before = stored(begun)
    code, out, err = reft(*arguments)
    assert (code, out) == (2, ""), err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    for said in [*says, "--allow-changes"]:
        assert said in err
    assert stored(begun) == before
    code, out, err = reft(*arguments, "--allow-changes")
    assert code == 0, err
    assert "adapter written to out" in out


def test_allowed_changes_are_trained_with(begun, reft):
    """A run resumed with another learning rate differs from the original run."""
    adapters = []
    for rate in ("0.01", "0.05"):
        code, _, err = reft(*command("--resume", "--allow-changes", lr=rate, steps="6"))
        assert code == 0, err
        adapters.append(read_adapter(begun / "out")[1])
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (begun / "out" / name).unlink()
        for path in (begun / "out" / "checkpoint-6").iterdir():
            path.unlink()
        (begun / "out" / "checkpoint-6").rmdir()
    same, other = adapters
    assert not all(torch.equal(same[name], other[name]) for name in same)
