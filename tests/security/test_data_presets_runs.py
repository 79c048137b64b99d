"""Hostile data files, presets and results of runs: refused with the file and the reason. Nothing
outside the folder is read, written or opened."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import TARGETS
from witnesses import files_of, nothing_happens

from reft.cli import app
from reft.paper import presets
from reft.paper.presets.load import read as read_preset
from reft.paper.runs.collect import collect
from reft.paper.runs.result import read_result
from reft.paper.tasks import get_task
from reft.paper.tasks.read import read_set
from reft.train.records import TEXT_LABEL, read_records

DEEP = "[" * 100_000
LONG = "1" * 5000
NOT_UTF8 = b'{"prompt": "\xff", "completion": "b"}'
GOOD = {"prompt": "a", "completion": "b"}

#: Data file -> (content, text of the error)
RECORDS: dict[str, tuple[str | bytes, str]] = {
    "deep": (DEEP, "nested too deep"),
    "deep in a line": (json.dumps(GOOD) + "\n" + '{"prompt":' * 10**5, "line 2: .*too deep"),
    "a number of 5000 digits": ('{"prompt": ' + LONG + "}", "line 1: .*digits"),
    "a key twice": ('{"prompt": "a", "prompt": "b", "completion": "c"}', "duplicate key 'prompt'"),
    "half a character": (json.dumps({**GOOD, "prompt": "\ud800"}), "unpaired surrogate"),
    "not UTF-8": (NOT_UTF8, "is not UTF-8 text"),
    "binary": (bytes(range(256)), "is not UTF-8 text"),
    "a megabyte in one field": (json.dumps({"p" * 10**6: 1}), "is missing.*1000002 characters"),
    "a thousand fields": (json.dumps({str(n): 1 for n in range(1000)}), "is missing"),
    "a list of lists": ("[[]]", "record 1: a record must be an object .*got list"),
}


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def refused(call: Callable[[], object], words: str, file: Path) -> None:
    with nothing_happens(), pytest.raises(ValueError) as caught:
        call()
    said = str(caught.value)
    assert re.search(words, said), said[:500]
    assert str(file) in said and len(said) < 2000


@pytest.mark.parametrize("name", RECORDS)
def test_records(name, tmp_path):
    content, words = RECORDS[name]
    file = write(tmp_path / "data.jsonl", content)
    refused(lambda: read_records(file), words, file)


@pytest.mark.parametrize("label", ["NaN", "Infinity", "-Infinity", "true", "null", "[]"])
def test_labels_are_finite(label, tmp_path):
    file = write(tmp_path / "data.jsonl", '{"text": "a", "label": ' + label + "}")
    refused(lambda: read_records(file, required=TEXT_LABEL), "'label' must be", file)
    file = write(tmp_path / "stsb" / "train.json",
        '[{"sentence1": "a", "sentence2": "b", "label": ' + label + "}]")  # fmt: skip
    refused(
        lambda: read_set(get_task("glue/stsb"), "stsb", "train", tmp_path),
        "'label' must be a number", file,
    )  # fmt: skip


def test_a_pipe_is_no_data_file(tmp_path):
    os.mkfifo(tmp_path / "data.jsonl")
    refused(lambda: read_records(tmp_path / "data.jsonl"), "plain file", tmp_path / "data.jsonl")


#: File of a task's set -> (content, text of the error)
SETS: dict[str, tuple[str, str | bytes, str]] = {
    "deep": ("train.json", DEEP, "nested too deep"),
    "digits": ("train.json", '[{"sentence": "a", "label": ' + LONG + "}]", "digits"),
    "half a character": ("train.json", '[{"sentence": "\\ud800", "label": 1}]', "must be text"),
    "half a character elsewhere": (
        "train.json", '[{"sentence": "a", "label": 1, "idx": "\\ud800"}]', "what JSON can hold"),
    "a column too many": ("train.csv", "sentence,label\na,1,2,3\n", "what JSON can hold"),
    "a csv of NUL": ("train.csv", b"sentence,label\na\0b,x\n", "'label' must be|cannot be read"),
    "a csv field of a megabyte": ("train.csv", f"sentence\n{'x' * 10**6}\n", "cannot be read"),
    "a csv that is not UTF-8": ("train.csv", b"sentence,label\n\xff,1\n", "cannot be read"),
    "a parquet of nothing": ("train.parquet", b"", "cannot be read"),
    "a parquet of noise": ("train.parquet", b"PAR1" + bytes(99) + b"PAR1", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_sets_of_tasks(name, tmp_path):
    pytest.importorskip("pyarrow.parquet")
    ending, content, words = SETS[name]
    file = write(tmp_path / "cola" / ending, content)
    refused(lambda: read_set(get_task("glue/cola"), "cola", "train", tmp_path), words, file)


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_pictures_of_a_set_are_never_opened(form, tmp_path):
    """An image column holds paths and URLs, which decoding would open."""
    datasets = pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    picture = {"path": "/nowhere/secret.png", "bytes": None}
    rows = {"sentence": ["a"], "label": [1], "picture": [picture]}
    features = datasets.Features(
        sentence=datasets.Value("string"), label=datasets.Value("int64"), picture=datasets.Image()
    )
    made = datasets.Dataset.from_dict(rows, features=features)
    folder = tmp_path / "cola"
    if form == "parquet":  # not by datasets, which would put the picture itself into the file
        folder.mkdir()
        parquet.write_table(made.data.table, folder / "train.parquet")
    else:
        made.remove_columns("picture").save_to_disk(str(folder / "train"))
        [data] = (folder / "train").glob("*.arrow")
        pyarrow = pytest.importorskip("pyarrow")
        with pyarrow.ipc.new_stream(str(data), made.data.table.schema) as stream:
            stream.write_table(made.data.table)
        info = folder / "train" / "dataset_info.json"
        stored = json.loads(info.read_text())
        info.write_text(json.dumps({**stored, "features": features.to_dict()}))
        with pytest.raises(FileNotFoundError, match="secret"):  # decoded, it would be opened
            datasets.load_from_disk(str(folder / "train"))[0]
    with nothing_happens():
        records = read_set(get_task("glue/cola"), "cola", "train", tmp_path)
    assert records.records[0]["picture"]["path"] == "/nowhere/secret.png"


# -------------------------------------------------------------------- presets

NAME = "glue/roberta-base/cola/loreft"


def changed(old: str, new: str) -> str:
    text = presets.to_toml(presets.load(NAME))
    assert old in text
    return text.replace(old, new, 1)


PRESETS: dict[str, tuple[str | bytes, str]] = {
    "deep": (f"x = {DEEP}", "is not TOML"),
    "not UTF-8": (b"x = '\xff'", "is not UTF-8"),
    "digits": (changed("epochs = ", f"epochs = {LONG} #"), "is not TOML|epochs must be"),
    "beyond floats": (changed("epochs = ", f"epochs = 1{'0' * 400} #"), "epochs must be a number"),
    "NaN": (changed("learning_rate = ", "learning_rate = nan #"), "learning_rate must be"),
    "infinite": (changed("epochs = ", "epochs = inf #"), "epochs must be"),
    "true": (changed("batch_size = ", "batch_size = true #"), "batch_size must be"),
    "a date": (changed("rank = ", "rank = 1979-05-27 #"), "rank must be"),
    "a batch of 2^80": (changed("batch_size = ", f"batch_size = {2**80} #"), "batch_size must be"),
    "a table": (changed("epochs = ", "epochs = {} #"), "epochs must be"),
    "a name above": (changed(f'name = "{NAME}"', 'name = "../../x"'), r"name must be .*got '\.\./"),
    "a name of the root": (changed(f'name = "{NAME}"', 'name = "/etc/x"'), "name must be"),
    "a name of dots": (changed(f'name = "{NAME}"', 'name = "a/../../b"'), "name must be"),
    "a set above": (changed('sets = ["cola"]', 'sets = ["../x"]'), "eval.sets must be"),
    "no task": (changed('task = "glue/cola"', 'task = "os.system"'), "no task 'os.system'"),
    "a field too many": (changed("[train]", "[train]\ntrust_remote_code = true"), "no field"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, tmp_path):
    content, words = PRESETS[name]
    file = write(tmp_path / "x.toml", content)
    refused(lambda: read_preset(file), words, file)
    with nothing_happens(), pytest.raises(SystemExit) as left:
        app.main(["train", "--preset", str(file), "--output", str(tmp_path / "out")])
    assert left.value.code == 2
    assert list(files_of(tmp_path)) == ["x.toml"]


def test_a_pipe_is_no_preset(tmp_path):
    os.mkfifo(tmp_path / "x.toml")
    refused(lambda: read_preset(tmp_path / "x.toml"), "plain file", tmp_path / "x.toml")


# -------------------------------------------------------------------- results of runs

RESULT = json.loads(TARGETS["result"].seeds()[0])


def result(**changes: object) -> str:
    return json.dumps({**RESULT, **changes})


RESULTS: dict[str, tuple[str | bytes, str]] = {
    "deep": (DEEP, "nested too deep"),
    "not JSON": ("{", "is not JSON"),
    "not UTF-8": (b"\xff", "is not UTF-8"),
    "a list": ("[]", "got list"),
    "a newer format": (result(format_version=99), "got 99"),
    "a format that is true": (result(format_version=True), "got True"),
    "no seed": (result(seed=None), "seed is None"),
    "no preset": (result(preset=None), "preset is None"),
    "scores of text": (result(scores={"a": "b"}), "must be numbers"),
    "a curve of numbers": (result(training={**RESULT["training"], "curve": [1]}), "be numbers"),
    "no hashes": (result(data={"train": 1}), "no hashes"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results(name, tmp_path):
    content, words = RESULTS[name]
    write(tmp_path / "run" / "run.json", "{}")
    file = write(tmp_path / "run" / "result.json", content)
    refused(lambda: read_result(file), words, file)
    before = files_of(tmp_path)
    with nothing_happens(), pytest.raises(SystemExit) as left:
        app.main(["report", str(tmp_path)])
    assert left.value.code == 2 and files_of(tmp_path) == before


def test_a_run_named_above_writes_inside(tmp_path):
    """The plot of a report is named after preset and model."""
    pytest.importorskip("matplotlib")
    write(tmp_path / "in" / "run" / "run.json", "{}")
    write(tmp_path / "in" / "run" / "result.json", result(model="../../../../x"))
    with pytest.raises(SystemExit) as left:
        app.main(["report", str(tmp_path / "in")])
    assert left.value.code == 0 and list(tmp_path.iterdir()) == [tmp_path / "in"]
    [picture] = (tmp_path / "in" / "report").iterdir()
    assert picture.suffix == ".png"
    bad = {**RESULT["preset"], "name": "../../x"}
    write(tmp_path / "in" / "run" / "result.json", result(preset=bad))
    with pytest.raises(ValueError, match="name must be"):
        collect(tmp_path / "in")
