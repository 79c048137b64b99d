"""Runs of presets on tiny base models: training, answers, scores, resuming."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_bases import save_llama, save_roberta
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from reft.model.reft_model import ReftModel
from reft.paper import presets
from reft.paper.runs import scoring
from reft.paper.runs.data import read_data
from reft.paper.runs.result import RESULT_FILE, read_json
from reft.paper.runs.run import ADAPTER_FOLDER, TRAINING_FILE, run
from reft.paper.runs.training import Clock
from reft.paper.tasks import ClassificationTask, get_task

DATA = Path(__file__).parents[1] / "task_data"

#: Three steps, the minimum for two kills with a step before, between and after.
SHORT = ("train.epochs=3", "train.batch_size=32", "train.accumulate=1", "train.max_records=8")
QUICK = (*SHORT, "eval.max_records=3", "eval.batch_size=2")


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    texts = [path.read_text(encoding="utf-8") for path in sorted(DATA.rglob("*.json*"))]
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": save_llama(folder / "llama", texts, layers=2),
        # Enough blocks for the deepest layer of any preset.
        "deep-llama": save_llama(folder / "deep-llama", texts, layers=25),
        "roberta": save_roberta(folder / "roberta", texts),
    }


@pytest.fixture
def go(bases, tmp_path):
    """Run a preset with changes; other arguments are passed to :func:`run`."""

    def start(name: str, *changes: str, folder: str = "out", seed: int = 42, dtype=None, **more):
        preset = presets.override(presets.load(name), [*QUICK, *changes])
        task = get_task(preset.task)
        classes = isinstance(task, ClassificationTask)
        deep = preset.config["layers"] != "all"
        base = bases["roberta" if classes else "deep-llama" if deep else "llama"]

        def make_base():
            if classes:
                heads = max(1, len(task.labels))
                model = AutoModelForSequenceClassification.from_pretrained(
                    base, num_labels=heads, dtype=dtype
                )
            else:
                model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
            return model.eval(), AutoTokenizer.from_pretrained(base)

        return run(
            preset, make_base, DATA, tmp_path / folder, model_name=str(base), seed=seed, **more
        )

    return start


class Killed(Exception):
    """A simulated kill of the process."""


def kill_training(monkeypatch, step: int) -> None:
    """Raise at the end of an optimizer step, once."""
    known = Clock.on_step_end

    def end(self, args, state, control, **kwargs):
        known(self, args, state, control, **kwargs)
        if state.global_step == step:
            monkeypatch.setattr(Clock, "on_step_end", known)
            raise Killed

    monkeypatch.setattr(Clock, "on_step_end", end)


def kill_answers(monkeypatch, call: int) -> None:
    """Raise once at the n-th generating call; every batch is written."""
    known, calls = scoring.generate_ids, []

    def generate(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            monkeypatch.setattr(scoring, "generate_ids", known)
            raise Killed
        return known(*args, **kwargs)

    monkeypatch.setattr(scoring, "BATCHES_AT_A_TIME", 1)
    monkeypatch.setattr(scoring, "generate_ids", generate)


def representatives() -> list[str]:
    """Return a preset for each task and each intervention. The others differ in settings only."""
    names, seen = [], set()
    for name in presets.names():
        preset = presets.load(name)
        kinds = {preset.task, preset.config["intervention"]}
        if not kinds <= seen:
            names.append(name)
            seen |= kinds
    return names


@pytest.mark.parametrize("name", representatives())
def test_a_preset_of_each_kind_runs_and_survives_kills(name, go, tmp_path, monkeypatch):
    kill_training(monkeypatch, step=2)
    with pytest.raises(Killed):
        go(name)
    folder = tmp_path / "out" / "seed-42"
    assert not (folder / TRAINING_FILE).exists()
    task = get_task(presets.load(name).task)
    if not isinstance(task, ClassificationTask):
        several = len(presets.load(name).eval.sets) > 1 or name.startswith("composition")
        kill_answers(monkeypatch, call=2 if several else 1)
        with pytest.raises(Killed):
            go(name, resume=True)
        assert (folder / TRAINING_FILE).exists()
        assert not (folder / RESULT_FILE).exists()
    result = go(name, resume=True)
    assert result == read_json(folder / RESULT_FILE)
    assert result["training"]["steps"] == 3
    assert [row["step"] for row in result["training"]["curve"]] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) for row in result["training"]["curve"])
    assert result["training"]["tokens"] > 0
    assert result["training"]["memory"]["bytes"] > 0
    preset = presets.load(name)
    answered = {
        test: read_json_list(folder / "answers" / f"{test}.json") for test in preset.eval.sets
    }
    assert all(answered.values())
    if preset.eval.scoring is None and not isinstance(task, ClassificationTask):
        assert result["scores"] == {}
        assert task.judge.partition(":")[0] in str(result["evaluation"]["scores"])
    else:
        assert set(result["scores"]) == {*preset.eval.sets, "average"}
    assert not list(folder.glob("checkpoint-*"))
    assert go(name, resume=True) == result


def read_json_list(path: Path) -> list:
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, list)
    return value


@pytest.mark.parametrize("name", ["commonsense/llama-7b/loreft", "glue/roberta-base/rte/loreft"])
def test_a_killed_run_ends_like_one_that_was_not(name, go, tmp_path, monkeypatch):
    dropout = "config.dropout=0.3"
    whole = go(name, dropout, folder="whole")
    kill_training(monkeypatch, step=2)
    with pytest.raises(Killed):
        go(name, dropout, folder="killed")
    again = go(name, dropout, folder="killed", resume=True)
    same = ("scores", "parameters", "data", "preset")
    assert {key: again[key] for key in same} == {key: whole[key] for key in same}
    assert again["training"]["curve"] == whole["training"]["curve"]
    assert again["training"]["tokens"] == whole["training"]["tokens"]
    first, second = (
        load_file(tmp_path / folder / "seed-42" / ADAPTER_FOLDER / "adapter_model.safetensors")
        for folder in ("whole", "killed")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_sampled_answers_do_not_depend_on_a_kill(go, tmp_path, monkeypatch):
    """Beam search and sampling as in the text of the paper."""
    how = ("sets=AQuA,mawps", "eval.decoding=sampled")
    monkeypatch.setattr(scoring, "BATCHES_AT_A_TIME", 1)
    whole = go("arithmetic/llama-7b/loreft", *how, folder="whole")
    kill_answers(monkeypatch, call=3)
    with pytest.raises(Killed):
        go("arithmetic/llama-7b/loreft", *how, folder="killed")
    again = go("arithmetic/llama-7b/loreft", *how, folder="killed", resume=True)
    assert again["scores"] == whole["scores"]
    for name in ("AQuA", "mawps"):
        texts = [
            (tmp_path / folder / f"seed-42/answers/{name}.texts.jsonl").read_text(encoding="utf-8")
            for folder in ("whole", "killed")
        ]
        assert texts[0] == texts[1]
        assert texts[0].count("\n") == 3


@pytest.mark.parametrize("name", ["commonsense/llama-7b/loreft", "glue/roberta-base/stsb/loreft"])
def test_a_base_in_bfloat16(name, go):
    sets = ("sets=boolq",) if name.startswith("commonsense") else ()
    result = go(name, "train.dtype=bfloat16", *sets, dtype=torch.bfloat16)
    assert result["dtype"] == "bfloat16"
    assert all(math.isfinite(row["loss"]) for row in result["training"]["curve"])
    assert result["orthonormality_error"] < 1e-5  # the adapter stays in float32


#: Settings for the alternatives where paper, code and README disagree.
OTHERWISE = [
    ("commonsense/llama-7b/loreft", ("tied=false", "untied_by=position")),
    ("commonsense/llama-7b/loreft", ("short_prompts=paper",)),
    ("commonsense/llama-7b/loreft", ("prompt_end=second_to_last",)),
    ("commonsense/llama-7b/loreft", ("eval.scoring=llm-adapters",)),
    ("arithmetic/llama-7b/loreft", ("eval.scoring=llm-adapters",)),
    ("gsm8k/llama-7b/direft-readme", ("eval.decoding=sampled",)),
    ("glue/roberta-base/rte/loreft", ("eval.split_rule=pyreft",)),
    ("glue/roberta-base/rte/loreft", ("tied=false", "untied_by=position")),
    ("ultrafeedback/llama-2-7b/loreft", ("eval.decoding=greedy",)),
]


@pytest.mark.parametrize(("name", "changes"), OTHERWISE)
def test_the_other_side_of_a_disagreement(name, changes, go):
    one_set = {"commonsense": ("sets=boolq",), "arithmetic": ("sets=AQuA",)}
    result = go(name, *changes, *one_set.get(name.partition("/")[0], ()))
    assert result["training"]["steps"] == 3
    changed = presets.Preset.from_dict(result["preset"]).changed()
    for change in changes:
        assert any(name.endswith(change.partition("=")[0].split(".")[-1]) for name in changed)


def test_the_parts_of_a_composition_answer_apart(go, monkeypatch):
    known, asked = scoring.generate_ids, []

    def generate(*args, **kwargs):
        asked.append(kwargs["each"]["subspaces"])
        return known(*args, **kwargs)

    monkeypatch.setattr(scoring, "generate_ids", generate)
    go("composition/llama-7b")
    assert asked == [["hellaswag", "instruct", None]]


def test_accumulated_batches_are_one_step(go):
    """Records in one batch or in four accumulated batches have equal losses and steps."""
    whole = go("commonsense/llama-7b/loreft", "sets=boolq", folder="one")
    four = go(
        "commonsense/llama-7b/loreft", "sets=boolq", "train.batch_size=2", "train.accumulate=4",
        folder="four",
    )  # fmt: skip
    assert four["training"]["steps"] == whole["training"]["steps"] == 3
    losses = [[row["loss"] for row in run["training"]["curve"]] for run in (whole, four)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_another_seed_is_another_run(go):
    first, second = (go("commonsense/llama-7b/loreft", seed=seed) for seed in (42, 43))
    assert first["training"]["curve"] != second["training"]["curve"]
    assert first["data"] == second["data"]


def test_a_folder_belongs_to_one_run(go, tmp_path):
    name = "commonsense/llama-7b/loreft"
    first = go(name)
    with pytest.raises(FileExistsError, match=r"seed-42 holds a run already; --resume"):
        go(name)
    with pytest.raises(ValueError, match=r"other settings: config\.rank: 8 there, 4 here"):
        go(name, "rank=4", resume=True)
    assert read_json(tmp_path / "out" / "seed-42" / RESULT_FILE) == first
    assert go(name, "rank=4", overwrite=True)["preset"]["config"]["rank"] == 4


def test_the_best_checkpoint_is_kept(go, bases, tmp_path):
    """The saved adapter has the metric of the best epoch when it is scored again."""
    result = go("glue/roberta-base/rte/loreft", "train.epochs=4", "train.learning_rate=0.05")
    rows = result["training"]["selection"]["rows"]
    best = max(rows, key=lambda row: row["accuracy"])
    assert result["training"]["selection"]["best"] == next(
        row["step"] for row in rows if row["accuracy"] == best["accuracy"]
    )
    assert len(rows) == 4
    preset = presets.override(presets.load("glue/roberta-base/rte/loreft"), QUICK)
    data = read_data(preset, DATA, 42)
    base = AutoModelForSequenceClassification.from_pretrained(bases["roberta"], num_labels=2)
    model = ReftModel.from_pretrained(base, tmp_path / "out" / "seed-42" / ADAPTER_FOLDER).eval()
    tokenizer = AutoTokenizer.from_pretrained(bases["roberta"])
    right = 0
    for record in data.selection:
        ids = tokenizer(record["sentence1"], record["sentence2"], return_tensors="pt")
        with torch.no_grad():
            right += model(**ids).logits.argmax().item() == record["label"]
    assert right / len(data.selection) == pytest.approx(best["accuracy"])


def test_glue_is_selected_and_tested_on_different_halves():
    preset = presets.load("glue/roberta-base/rte/loreft")
    first, second = (read_data(preset, DATA, seed) for seed in (42, 43))
    [tests] = first.tests
    selection, rest = [[json.dumps(r) for r in part] for part in (first.selection, tests.records)]
    assert not set(selection) & set(rest)
    assert abs(len(selection) - len(rest)) <= 1
    assert [json.dumps(r) for r in second.selection] != selection


def test_training_records_are_the_first_of_a_shuffle():
    """The order is that of `dataset.shuffle(seed)` and `select(range(n))` in the published code."""
    path = DATA / "ft-training_set" / "commonsense_170k.json"
    shuffled = Dataset.from_json(str(path)).shuffle(seed=7).select(range(5))
    preset = presets.override(presets.load("commonsense/llama-7b/loreft"), ["train.max_records=5"])
    assert list(read_data(preset, DATA, 7).training) == list(shuffled)
    assert list(read_data(preset, DATA, 8).training) != list(shuffled)


def test_answers_are_scored_again_without_the_model(go, tmp_path):
    result = go("commonsense/llama-7b/loreft", "sets=boolq")
    preset = presets.override(presets.load("commonsense/llama-7b/loreft"), [*QUICK, "sets=boolq"])
    [tests] = read_data(preset, DATA, 42).tests
    lines = (tmp_path / "out/seed-42/answers/boolq.texts.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    prompts = [get_task("commonsense").prompt(record) for record in tests.records]
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
    right = [
        f"{prompt}the correct answer is {record['answer']}"
        for prompt, record in zip(prompts, tests.records, strict=True)
    ]
    rule = get_task("commonsense").scorings["pyreft"]
    assert scoring.score(tests, right, rule) == {"accuracy": 1.0, "correct": 3, "total": 3}
    assert scoring.score(tests, texts, rule)["accuracy"] * 100 == result["scores"]["boolq"]


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on(bases, tmp_path):
    command = [sys.executable, "-m", "reft", "train", "--preset", "commonsense/llama-7b/loreft"]
    command += ["--model", str(bases["llama"]), "--data", str(DATA), "--output", "out"]
    command += ["--seeds", "42", "--device", "cpu"]
    for change in (*QUICK, "sets=boolq", "train.epochs=60"):
        command += ["--set", change]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("seed-42/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not (tmp_path / "out/seed-42" / TRAINING_FILE).exists()
    again = subprocess.run(
        [*command, "--resume"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    result = read_json(tmp_path / "out/seed-42" / RESULT_FILE)
    assert result["training"]["steps"] == 60
    assert "boolq" in again.stdout
