"""`reft train --preset`: runs from the command line, and a one-line error for every mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_bases import save_llama, save_roberta

from reft.cli.app import main
from reft.io.adapter_files import read_adapter
from reft.paper.runs.result import RESULT_FILE, read_json

DATA = Path(__file__).parents[1] / "paper" / "task_data"
COMMONSENSE = "commonsense/llama-7b/loreft"

SHORT = {
    "train.epochs": "2",
    "train.accumulate": "1",
    "train.max_records": "6",
    "eval.max_records": "2",
    "eval.batch_size": "2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a folder with the tiny base models ``llama`` and ``roberta``."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(DATA.rglob("*.json*"))]
    place = tmp_path_factory.mktemp("place")
    save_llama(place / "llama", texts, layers=2)
    save_roberta(place / "roberta", texts)
    return place


@pytest.fixture
def reft(capfd, folder, monkeypatch):
    """Run the command line in the folder and return (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)

    def run(*arguments: str):
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main(arguments)
        return left.value.code, *capfd.readouterr()

    yield run
    shutil.rmtree(folder / "out", ignore_errors=True)


def command(preset: str = COMMONSENSE, *more: str, model: str = "llama", **changes: str):
    """Make the arguments of a short run; names of ``changes`` have __ instead of the dot."""
    settings = {**SHORT, **{name.replace("__", "."): value for name, value in changes.items()}}
    given = ["train", "--preset", preset, "-m", model, "-d", str(DATA), "-o", "out"]
    for name, value in settings.items():
        given += ["--set", f"{name}={value}"]
    return (*given, "--device", "cpu", *more)


def test_two_seeds_and_a_report(reft, folder):
    code, out, err = reft(*command(COMMONSENSE, "--seeds", "42,43", eval__sets="boolq,piqa"))
    assert code == 0, err
    assert f"{COMMONSENSE} on llama: average" in out
    for part in ("boolq", "piqa", "84.4", "2 runs of 2 steps", "train.epochs", "seeds not run: 44"):
        assert part in out, part
    assert "seed 42: 6 records" in err
    results = [read_json(folder / f"out/seed-{seed}" / RESULT_FILE) for seed in (42, 43)]
    assert [result["seed"] for result in results] == [42, 43]
    config, _ = read_adapter(folder / "out/seed-42/adapter")
    assert (config.rank, config.positions, config.dropout_on) == (8, "f7+l7", "row")
    assert config.base_model_name_or_path == "llama"

    code, out, _ = reft("report", "out", "--json")
    [group] = json.loads(out)
    assert group["seeds"] == [42, 43]

    code, out, err = reft("generate", "-m", "llama", "-a", "out/seed-42/adapter", "-p", "Is it so?")
    assert code == 0, err


def test_without_an_output_it_goes_into_a_folder_of_its_name(reft, folder):
    given = list(command(COMMONSENSE, "--seeds", "42", eval__sets="boolq"))
    at = given.index("-o")
    del given[at : at + 2]
    code, _, err = reft(*given)
    assert code == 0, err
    assert read_json(folder / "runs" / COMMONSENSE / "seed-42" / RESULT_FILE)["seed"] == 42
    shutil.rmtree(folder / "runs")


def test_it_goes_on_and_does_not_overwrite(reft, folder):
    first = command(COMMONSENSE, "--seeds", "42", eval__sets="boolq")
    assert reft(*first)[0] == 0
    done = (folder / "out/seed-42" / RESULT_FILE).read_bytes()
    code, _, err = reft(*first)
    assert code == 2
    assert "--resume continues it" in err
    assert reft(*first, "--resume")[0] == 0
    assert (folder / "out/seed-42" / RESULT_FILE).read_bytes() == done
    more = command(COMMONSENSE, "--seeds", "42,44", "--resume", eval__sets="boolq")
    code, out, _ = reft(*more)
    assert code == 0
    assert "2 runs" in out
    code, _, err = reft(*command(COMMONSENSE, "--seeds", "42", "--resume", eval__sets="piqa"))
    assert code == 2
    assert "with other settings: eval.sets" in err
    assert reft(*first, "--overwrite")[0] == 0


def test_a_classification(reft):
    preset = "glue/roberta-base/stsb/loreft"
    code, out, err = reft(*command(preset, "--seeds", "42", model="roberta", eval__max_records="6"))
    assert code == 0, err
    assert "stsb" in out
    assert "and a head of" in err


def test_a_file_of_the_users(reft, folder):
    assert reft("presets", "copy", COMMONSENSE, "mine.toml")[0] == 0
    path = folder / "mine.toml"
    text = path.read_text(encoding="utf-8")
    assert "\nrank = 8" in text
    path.write_text(text.replace("\nrank = 8", "\nrank = 2"), encoding="utf-8")
    code, out, err = reft(*command("mine.toml", "--seeds", "42", eval__sets="boolq"))
    assert code == 0, err
    assert read_json(folder / "out/seed-42" / RESULT_FILE)["preset"]["config"]["rank"] == 2
    assert "config.rank" in out


PLAIN = ("train", "-m", "llama", "-d", "x.jsonl", "-o", "out")

MISTAKES = {
    "no-such-preset": (command("commonsense/llama-7b/lorft"), ["lorft", COMMONSENSE]),
    "no-such-file": (command("nowhere.toml"), ["nowhere.toml"]),
    "no-such-setting": (command(train__epoch="3"), ["train.epoch", "train.epochs"]),
    "not-a-change": (command(COMMONSENSE, "--set", "rank"), ["rank"]),
    "bad-value": (command(train__epochs="many"), ["epochs", "many"]),
    "bad-config": (command(config__rank="0"), ["rank", "0"]),
    "no-such-set": (command(eval__sets="boolk"), ["boolk", "boolq"]),
    "no-such-decoding": (command(eval__decoding="fast"), ["fast", "greedy", "sampled"]),
    "no-such-scoring": (command(eval__scoring="kind"), ["kind", "llm-adapters"]),
    "another-option": (command(COMMONSENSE, "--rank", "4"), ["--rank", "--set"]),
    "two-ways": (command(COMMONSENSE, "--resume", "--overwrite"), ["--resume", "--overwrite"]),
    "seeds": (command(COMMONSENSE, "--seeds", "a,b"), ["--seeds", "a,b"]),
    "seeds-twice": (command(COMMONSENSE, "--seeds", "42,42"), ["different", "42,42"]),
    "seeds-negative": (command(COMMONSENSE, "--seeds=-1"), ["at least 0", "-1"]),
    "no-such-model": (command(model="./nowhere"), ["no such model folder", "./nowhere"]),
    "no-such-data": (command(COMMONSENSE, "-d", "nowhere"), ["--data", "nowhere"]),
    "set-missing": (
        command(COMMONSENSE, "-d", "llama"),
        ["train", "commonsense_170k", "LLM-Adapters", '"answer": '],
    ),
    "an-encoder-is-wanted": (
        command("glue/roberta-base/cola/loreft", "-d", "llama", model="roberta"),
        ["cola", "nyu-mll/glue", "sentence"],
    ),
    "output-is-a-file": (command(COMMONSENSE, "-o", "llama/config.json"), ["is a file"]),
    "set-without-preset": ((*PLAIN, "--set", "rank=4"), ["--set needs --preset"]),
    "seeds-without-preset": ((*PLAIN, "--seeds", "42"), ["--seeds needs --preset"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, reft, folder):
    arguments, parts = MISTAKES[mistake]
    code, _, err = reft(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert code == 2, err
    assert len(lines) == 1, err
    assert all(part in lines[0] for part in parts), lines[0]
    assert not (folder / "out" / "seed-42" / "run.json").exists()
