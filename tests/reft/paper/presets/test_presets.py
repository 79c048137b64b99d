"""Presets: each loads, has a source for each number, and is preserved by JSON and TOML."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from reft.paper import presets
from reft.paper.presets import Preset, settings
from reft.paper.presets.load import resolve
from reft.paper.tasks import GenerationTask, get_task
from reft.paper.tasks.split import SPLITS

NAMES = presets.names()

#: Name in the paper -> intervention.
METHODS = {
    "LoReFT": "loreft",
    "LoReFT (half)": "loreft",
    "LoReFT (1K)": "loreft",
    "DiReFT": "direft",
    "ConsReFT": "consreft",
    "h+R^T b": "lobireft",
    "h+R^T(b-Rh)": "consreft",
    "h+R^T(Wh+b)": "direft_orthonormal",
    "h+W2^T(W1h+b-W2h)": "noreft",
}


def numbers(value: Any, path: str) -> Iterator[str]:
    """Yield the paths of numbers in a JSON value; booleans are not numbers."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers(inner, f"{path}.{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner, path)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path


# ------------------------------------------------------------------ every preset


def test_all_are_there():
    assert len(NAMES) == len(set(NAMES)) == 68
    runs = {name.rpartition("/")[2] for name in NAMES if name.startswith("arithmetic/llama-7b/")}
    ablations = {"ablation-lobireft", "ablation-consreft", "ablation-direft-orth"}
    assert runs == {"loreft", "direft", "loreft-e3", "ablation-noreft", *ablations}
    tasks = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
    for model in ("roberta-base", "roberta-large"):
        for method in ("loreft", "direft"):
            assert {f"glue/{model}/{task}/{method}" for task in tasks} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_preset(name):
    preset = presets.load(name)
    assert preset.name == name
    assert set(preset.task.split("/")) <= set(name.split("/"))
    assert preset.config["intervention"] == METHODS[preset.method]
    config = preset.reft_config()
    assert config.rank == preset.config["rank"]
    task = get_task(preset.task)
    generation = isinstance(task, GenerationTask)
    assert config.task_type == ("CAUSAL_LM" if generation else "SEQ_CLS")
    assert set(preset.eval.sets) <= set(task.eval_sets)
    if generation:
        assert preset.eval.decoding in task.decodings
        assert preset.eval.scoring in ({*task.scorings} or {None})
        assert (preset.eval.split_rule, preset.train.select_by) == (None, None)
    else:
        assert preset.eval.split_rule == "original"
        assert preset.train.select_by == task.metric
        assert preset.eval.split == task.eval_split
        assert preset.train.label_dtype == (None if task.labels else "bfloat16")


@pytest.mark.parametrize("name", NAMES)
def test_no_number_without_a_source(name):
    preset = presets.load(name)
    whole = preset.to_dict()
    paths = [
        path
        for section in ("config", "train", "eval", "published")
        for path in numbers(whole[section], section)
    ]
    assert len(paths) > 10
    for path in paths:
        origin = preset.known_from(".".join(path.split(".")[:2]))
        assert origin.status in ("read", "inferred", "assumed")
        assert len(origin.source) > 4
    assert preset.known_from("hub_id").source
    assert preset.changed() == []
    # no source for a missing setting
    for key in preset.provenance:
        section, dot, field = key.partition(".")
        assert section in whole and (not dot or field in whole[section]), key


@pytest.mark.parametrize("name", NAMES)
def test_json_and_toml_give_it_back(name, tmp_path):
    preset = presets.load(name)
    assert Preset.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset
    file = tmp_path / "copy.toml"
    file.write_text(presets.to_toml(preset), encoding="utf-8")
    assert presets.load(file) == preset
    assert presets.load(str(file)) == preset
    assert "inherits" not in tomllib.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_comments_say_where_each_value_is_from(name):
    preset = presets.load(name)
    settings, _, _ = presets.to_toml(preset).partition("\n[provenance]\n")
    section, comment, after, seen = "", "", "", 0
    for line in settings.splitlines():
        if line.startswith("["):
            section, comment = line.strip("[]"), ""
        elif line.startswith("#"):
            text = " ".join(line.removeprefix("#").split())
            comment = f"{comment} {text}" if after.startswith("#") else text
        elif section and line:
            field = line.partition(" = ")[0]
            assert comment == str(preset.known_from(f"{section}.{field}")), field
            seen += 1
        after = line
        assert len(line) <= 100 or not line.startswith("#")
    assert seen > 25


@pytest.mark.parametrize("name", [name for name in NAMES if presets.load(name).published.scores])
def test_published_scores(name):
    preset = presets.load(name)
    published = preset.published
    assert published.table
    assert tuple(published.scores) == preset.eval.sets
    # The paper rounds the average and the scores.
    mean = math.fsum(published.scores.values()) / len(published.scores)
    assert published.average == pytest.approx(mean, abs=0.0501 + 1e-9)
    assert set(published.sd) <= {*published.scores, "average"}


# ------------------------------------------------------------------ facts, in rows of the paper

SAME = ("learning_rate", "warmup", "weight_decay", "max_length", "seeds")


@pytest.mark.parametrize(
    ("first_name", "second_name", "differs"),
    [
        ("commonsense/llama-7b/loreft", "arithmetic/llama-7b/loreft", {"epochs"}),
        ("commonsense/llama-7b/loreft", "commonsense/llama-3-8b/loreft", set()),
        ("arithmetic/llama-7b/direft", "arithmetic/llama-13b/direft", set()),
        ("arithmetic/llama-7b/loreft", "arithmetic/llama-13b/ablation-noreft", set()),
        (
            "commonsense/llama-7b/loreft",
            "commonsense/llama-7b/loreft-e3",
            {"epochs", "accumulate"},
        ),
        (
            "ultrafeedback/llama-2-7b/loreft",
            "ultrafeedback/llama-2-7b/loreft-1k",
            {"max_records"},
        ),
    ],
)
def test_what_two_presets_differ_in(first_name, second_name, differs):
    first, second = (presets.load(name).to_dict()["train"] for name in (first_name, second_name))
    assert {name for name in first if first[name] != second[name]} == differs


@pytest.mark.parametrize(
    ("name", "field", "status"),
    [
        ("commonsense/llama-7b/loreft", "config.rank", "read"),
        ("commonsense/llama-7b/direft", "config.rank", "inferred"),
        ("arithmetic/llama-13b/direft", "train.weight_decay", "inferred"),
        ("arithmetic/llama-13b/direft", "train.epochs", "read"),
        ("commonsense/llama-3-8b/loreft", "train.learning_rate", "inferred"),
        ("commonsense/llama-3-8b/direft", "hub_id", "assumed"),
        ("commonsense/llama-2-7b/loreft", "hub_id", "read"),
        ("glue/roberta-large/qqp/direft", "hub_id", "assumed"),
        ("glue/roberta-base/rte/loreft", "train.seeds", "inferred"),
        ("glue/roberta-base/sst2/loreft", "train.seeds", "read"),
        ("ultrafeedback/llama-2-7b/direft", "train.seeds", "inferred"),
        ("arithmetic/llama-7b/loreft-e3", "train.learning_rate", "assumed"),
    ],
)
def test_how_a_value_is_known(name, field, status):
    assert presets.load(name).known_from(field).status == status


@pytest.mark.parametrize("name", [name for name in NAMES if "/roberta-" in name])
def test_glue_settings_are_of_their_own_table(name):
    if name.endswith("/readme"):
        return
    _, model, _, method = name.split("/")
    table = {"base": {"loreft": 9, "direft": 11}, "large": {"loreft": 10, "direft": 12}}
    wanted = f"Table {table[model.partition('-')[2]][method]}"
    preset = presets.load(name)
    for field in ("config.positions", "config.dropout", "train.learning_rate", "train.epochs"):
        assert preset.known_from(field).source == wanted
    assert wanted in preset.title


@pytest.mark.parametrize("name", NAMES)
def test_the_adapters_dtype_is_explained(name):
    preset = presets.load(name)
    assert preset.config["dtype"] == "float32"
    assert "float32" in preset.known_from("config.dtype").source
    assert (preset.config["dropout_on"], preset.config["init"]) == ("row", "pyreft")


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("commonsense/llama-7b/loreft", "last"),
        ("emoji/llama-2-7b-chat", "last"),
        ("goody2/llama-2-7b-chat", "last"),
        ("memorisation/llama-13b", "last"),
        ("alpaca/llama-7b/loreft", "second_to_last"),
        ("composition/llama-7b", "second_to_last"),
    ],
)
def test_where_the_prompt_ends(name, end):
    preset = presets.load(name)
    assert preset.config["prompt_end"] == end
    assert "dataset.py" in preset.known_from("config.prompt_end").source


# ------------------------------------------------------------------ inheritance

TABLES: dict[str, dict[str, Any]] = {
    "root": {
        "task": "x",
        "config": {"rank": 1, "layers": "all"},
        "published": {"table": "1", "average": 5.0},
        "provenance": {"config": "read: a", "config.rank": "read: b", "train": "read: c"},
    },
    "child": {
        "inherits": "root",
        "config": {"rank": 2},
        "published": {"table": "2"},
        "provenance": {"config.rank, config.layers": "inferred: d"},
    },
    "grandchild": {"inherits": "child", "provenance": {"config": "assumed: e"}},
    "stray": {"inherits": "nobody"},
    "a": {"inherits": "b"},
    "b": {"inherits": "a"},
}


def test_a_child_has_what_it_does_not_say():
    whole = resolve("child", TABLES)
    assert (whole["task"], whole["config"]) == ("x", {"rank": 2, "layers": "all"})
    assert "inherits" not in whole
    # results are not inherited
    assert whole["published"] == {"table": "2"}
    assert whole["provenance"] == {
        "config": "read: a",
        "config.rank": "inferred: d",
        "config.layers": "inferred: d",
        "train": "read: c",
    }


def test_a_section_replaces_the_fields_of_the_parent():
    provenance = resolve("grandchild", TABLES)["provenance"]
    assert provenance == {"config": "assumed: e", "train": "read: c"}


@pytest.mark.parametrize("name", ["stray", "a"])
def test_a_bad_parent(name):
    with pytest.raises(ValueError, match=f"preset {name} inherits from"):
        resolve(name, TABLES)


def test_two_loads_share_nothing():
    preset = presets.load(NAMES[0])
    preset.config["rank"] = 3  # type: ignore[index]
    preset.published.scores.clear()  # type: ignore[attr-defined]
    assert presets.load(NAMES[0]) != preset


# ------------------------------------------------------------------ names of transformers


def test_names_of_others_are_theirs():
    assert set(settings.SCHEDULES) <= {schedule.value for schedule in SchedulerType}
    assert set(settings.OPTIMIZERS) <= {optimizer.value for optimizer in OptimizerNames}
    assert tuple(SPLITS) == settings.SPLIT_RULES
    for kind, checks in (
        (presets.TrainSettings, settings.TRAIN_CHECKS),
        (presets.EvalSettings, settings.EVAL_CHECKS),
        (presets.Published, settings.PUBLISHED_CHECKS),
    ):
        assert list(checks) == list(kind.__dataclass_fields__)


def test_reading_all_presets_needs_no_torch():
    code = """
import sys
from reft.paper import presets
for name in presets.names():
    presets.to_toml(presets.load(name))
print([name for name in ("torch", "transformers", "datasets", "rich") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_loaded_preset_is_nobody_elses():
    """Whoever writes into what it holds changes this one alone."""
    preset = presets.load("commonsense/llama-7b/loreft")
    preset.published.scores.clear()
    preset.config.clear()
    again = presets.load("commonsense/llama-7b/loreft")
    assert again.published.scores["boolq"] == 69.3
    assert again.config["rank"] == 8
