"""Records are read from every supported layout; errors name the record."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from reft.paper.tasks import TASKS, get_task
from reft.paper.tasks.read import read_set
from reft.paper.tasks.split import glue_split, gsm8k_split

DATA = Path(__file__).parents[1] / "task_data"
COMMONSENSE = get_task("commonsense")
ROWS = json.loads((DATA / "dataset/boolq/test.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", TASKS)
def test_every_set_of_the_fixtures(name):
    task = TASKS[name]
    train = read_set(task, task.train_set, "train", DATA)
    assert train.records
    for set_name in task.eval_sets:
        split = "train" if name.startswith("gsm8k") else task.eval_split
        assert read_set(task, set_name, split, DATA).records


LAYOUTS = {
    "clone of LLM-Adapters": lambda d: write(d / "dataset/boolq/test.json", json.dumps(ROWS)),
    "pyreft's script": lambda d: write(d / "boolq/test.json", json.dumps(ROWS)),
    "one file": lambda d: write(d / "boolq.json", json.dumps(ROWS)),
    "lines": lambda d: write(d / "boolq/test.jsonl", "\n".join(map(json.dumps, ROWS))),
    "lines named json": lambda d: write(d / "boolq/test.json", "\n".join(map(json.dumps, ROWS))),
    "byte order mark": lambda d: write(d / "boolq/test.json", "\ufeff" + json.dumps(ROWS)),
    "parquet": lambda d: parquet(d / "boolq/test.parquet"),
    "csv": lambda d: Dataset.from_list(ROWS).to_csv(str(made(d / "boolq/test.csv"))),
    "saved": lambda d: Dataset.from_list(ROWS).save_to_disk(str(d / "boolq/test")),
    "saved with splits": lambda d: DatasetDict(
        {"test": Dataset.from_list(ROWS), "train": Dataset.from_list(ROWS[:1])}
    ).save_to_disk(str(d / "boolq")),
}


def made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write(path: Path, text: str) -> None:
    made(path).write_text(text, encoding="utf-8")


def parquet(path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(str(made(path)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    LAYOUTS[layout](tmp_path)
    records = read_set(COMMONSENSE, "boolq", "test", tmp_path)
    wanted = read_set(COMMONSENSE, "boolq", "test", DATA)
    assert records.records == wanted.records
    assert records.sha256 == wanted.sha256
    assert "boolq" in records.source


def test_another_record_is_another_hash(tmp_path):
    changed = [{**ROWS[0], "answer": "false"}, *ROWS[1:]]
    write(tmp_path / "boolq.json", json.dumps(changed))
    here = read_set(COMMONSENSE, "boolq", "test", tmp_path).sha256
    assert here != read_set(COMMONSENSE, "boolq", "test", DATA).sha256


def test_training_records_lie_in_a_folder_of_their_own(tmp_path):
    made(tmp_path / "ft-training_set/x")
    shutil.copy(DATA / "ft-training_set/commonsense_170k.json", tmp_path / "ft-training_set")
    assert len(read_set(COMMONSENSE, "commonsense_170k", "train", tmp_path).records) == 16


def test_labels_of_csv_files_are_numbers(tmp_path):
    write(tmp_path / "stsb/train.csv", "sentence1,sentence2,label\nA,B,2.5\nC,D,5\n")
    records = read_set(get_task("glue/stsb"), "stsb", "train", tmp_path)
    assert [record["label"] for record in records.records] == [2.5, 5]
    write(tmp_path / "cola/train.csv", "sentence,label\nA,1\n")
    assert read_set(get_task("glue/cola"), "cola", "train", tmp_path).records[0]["label"] == 1


def test_a_missing_set_says_all_one_needs(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        read_set(COMMONSENSE, "hellaswag", "test", tmp_path)
    text = str(error.value)
    for part in (
        "test records of 'hellaswag'",
        str(tmp_path),
        "hellaswag/test{.json,.jsonl,.parquet,.csv}",
        '"answer": "false"',
        "https://github.com/AGI-Edgerunners/LLM-Adapters/tree/main/dataset/hellaswag",
    ):
        assert part in text, part


BAD = {
    "not JSON": ("[{", ["boolq.json", "JSON list of records, or a record on each line"]),
    "a word": ("hello", ["boolq.json", "JSON list"]),
    "no record": ("[]", ["holds no records"]),
    "no object": ('["a"]', ["record 1", "must be an object", "str"]),
    "no field": (
        '[{"instruction": "Q", "answer": "a"}, {"answer": "b"}]',
        ["record 2", "'instruction' is missing", "'answer'"],
    ),
    "no text": (
        '[{"instruction": 3, "answer": "a"}]',
        ["record 1", "'instruction' must be text", "3"],
    ),
    "pointer": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:943d90d3\nsize 130630039\n",
        ["Git LFS pointer", "git lfs pull"],
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_file_that_cannot_be_used(bad, tmp_path):
    text, parts = BAD[bad]
    write(tmp_path / "boolq.json", text)
    with pytest.raises(ValueError, match="boolq") as error:
        read_set(COMMONSENSE, "boolq", "test", tmp_path)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    ("name", "label", "parts"),
    [
        ("cola", -1, ["test set of GLUE has no labels", "0 (unacceptable)"]),
        ("cola", 2, ["got 2"]),
        ("cola", 1.0, ["got 1.0"]),
        ("cola", True, ["got True"]),
        ("stsb", "high", ["must be a number", "'high'"]),
        ("stsb", None, ["must be a number"]),
    ],
)
def test_labels(name, label, parts, tmp_path):
    task = get_task(f"glue/{name}")
    write(tmp_path / f"{name}/train.json", json.dumps([{**task.example, "label": label}]))
    with pytest.raises(ValueError, match="record 1: field 'label'") as error:
        read_set(task, name, "train", tmp_path)
    assert all(part in str(error.value) for part in parts), error.value


def test_no_hub_is_said_at_once(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'cola'.*cannot be reached.*nyu-mll/glue.*--data"):
        read_set(get_task("glue/cola"), "cola", "train", None)
    with pytest.raises(FileNotFoundError, match=r"'ultrafeedback' is not on the hub"):
        read_set(get_task("ultrafeedback"), "ultrafeedback", "train", None)


def test_demos_bring_their_data():
    for name, count in (("goody2", 5), ("emoji", 10), ("memorisation", 1)):
        records = read_set(get_task(name), name, "train", None)
        assert len(records.records) == count
    assert len(records.records[0]["completion"]) == 2000


def test_composition_has_two_parts():
    records = read_set(
        get_task("composition"), "hellaswag_de+ultrafeedback_1k", "train", DATA
    ).records
    german = [record for record in records if record["subspaces"] == "hellaswag"]
    assert [record["output"] for record in german][:2] == [
        "legt sie in die Pfanne.",
        "steht wieder auf.",
    ]
    assert german[3]["output"] == "läuft zur Tür."  # fewer than four: the last
    assert not any(record["ends"] for record in german)
    rest = [record for record in records if record["subspaces"] == "instruct"]
    assert (len(german), len(rest)) == (4, 6)
    assert all("ends" not in record for record in rest)


# -------------------------------------------------------------------- splits


@pytest.mark.parametrize(("count", "chosen"), [(2, 1), (277, 138), (5000, 2500), (5001, 1000)])
@pytest.mark.parametrize("rule", ["original", "pyreft"])
def test_a_validation_set_is_cut_in_two(count, chosen, rule):
    records = [{"row": row} for row in range(count)]
    selection, rest = glue_split(records, 42, rule)
    assert (len(selection), len(rest)) == (chosen, count - chosen)
    rows = [record["row"] for record in selection + rest]
    assert sorted(rows) == list(range(count))
    if count > 2:
        assert glue_split(records, 43, rule) != (selection, rest)
    assert glue_split(records, 42, rule) == (selection, rest)


def test_the_cuts_are_those_of_the_published_code():
    """Both splits make the same calls as the published code, directly after `set_seed`."""
    from transformers import set_seed

    records = [{"row": row} for row in range(50)]
    set_seed(44)
    parts = Dataset.from_list(records).train_test_split(test_size=25)
    assert glue_split(records, 44, "original") == (list(parts["test"]), list(parts["train"]))
    set_seed(44)
    rest, selection = torch.utils.data.random_split(records, [25, 25])
    assert glue_split(records, 44, "pyreft") == (list(selection), list(rest))


@pytest.mark.parametrize("rule", ["original", "pyreft"])
def test_a_cut_leaves_random_numbers_alone(rule):
    def state():
        numpy = np.random.get_state()[1].tolist()  # noqa: NPY002 (what set_seed seeds)
        return random.getstate(), numpy, torch.get_rng_state().tolist()

    before = state()
    glue_split([{"row": row} for row in range(9)], 1, rule)
    assert state() == before


def test_cuts_that_cannot_be_made():
    with pytest.raises(ValueError, match="split_rule must be one of original, pyreft; got 'half'"):
        glue_split([{}, {}], 1, "half")
    with pytest.raises(ValueError, match="at least 2 records to be split, got 1"):
        glue_split([{}], 1)


def test_gsm8k_is_cut_at_its_end():
    rows = [{"row": row} for row in range(7473)]
    rest, held = gsm8k_split(rows)
    assert (len(rest), held[0]["row"], held[-1]["row"]) == (7173, 7173, 7472)
    assert [len(part) for part in gsm8k_split(rows[:12])] == [9, 3]
