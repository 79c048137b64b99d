"""Changes of preset settings by ``--set`` or in a copy: allowed values and provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from reft.paper import presets
from reft.paper.presets import Preset, Provenance
from reft.paper.presets.change import value_of

# ------------------------------------------------------------------ by --set


@pytest.fixture
def commonsense() -> Preset:
    return presets.load("commonsense/llama-7b/loreft")


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ("rank=4", "config.rank", 4),
        ("config.rank = 4", "config.rank", 4),
        ("layers=3;9", "config.layers", [3, 9]),
        ("layers=15", "config.layers", [15]),
        ("layers=-1", "config.layers", [-1]),
        ("positions=f3", "config.positions", "f3"),
        ("tied=false", "config.tied", False),
        ("dropout=0.1", "config.dropout", 0.1),
        ("activation=relu", "config.activation", "relu"),
        ("modules_to_save=a,b", "config.modules_to_save", ["a", "b"]),
        ("modules_to_save=a", "config.modules_to_save", ["a"]),
        ("config.dtype=float64", "config.dtype", "float64"),
        ("epochs=3", "train.epochs", 3.0),
        ("train.epochs=0.5", "train.epochs", 0.5),
        ("learning_rate=1e-3", "train.learning_rate", 1e-3),
        ("seeds=42,43", "train.seeds", [42, 43]),
        ("seeds=7", "train.seeds", [7]),
        ("max_length=64", "train.max_length", 64),
        ("schedule=cosine", "train.schedule", "cosine"),
        ("sets=boolq,piqa", "eval.sets", ["boolq", "piqa"]),
        ("sets=boolq", "eval.sets", ["boolq"]),
        ("decoding=sampled", "eval.decoding", "sampled"),
        ("scoring=llm-adapters", "eval.scoring", "llm-adapters"),
        ("scoring=none", "eval.scoring", None),
        # a name in several sections means the setting of train
        ("max_records=5", "train.max_records", 5),
        ("eval.max_records=5", "eval.max_records", 5),
        ("batch_size=1", "train.batch_size", 1),
        ("eval.batch_size=1", "eval.batch_size", 1),
        ("dtype=float32", "train.dtype", "float32"),
    ],
)
def test_override(commonsense, change, field, value):
    changed = presets.override(commonsense, [change])
    section, _, name = field.partition(".")
    got = changed.to_dict()[section][name]
    assert (got, type(got)) == (value, type(value))
    assert changed.changed() == [field]
    assert changed.known_from(field).status == "changed"
    # nothing else changed
    before = commonsense.to_dict()
    after = changed.to_dict()
    after[section] = {**after[section], name: before[section].get(name)}
    if name not in before[section]:
        del after[section][name]
    assert {**after, "provenance": None} == {**before, "provenance": None}
    assert Preset.from_dict(changed.to_dict()) == changed


def test_the_changed_configuration_is_used(commonsense):
    config = presets.override(commonsense, ["rank=4", "layers=3;9"]).reft_config(
        base_model_name_or_path="here"
    )
    assert (config.rank, config.layers, config.base_model_name_or_path) == (4, (3, 9), "here")


def test_several_at_once_and_again(commonsense):
    once = presets.override(commonsense, ["rank=4", "epochs=1", "rank=2"])
    assert once.config["rank"] == 2
    assert sorted(once.changed()) == ["config.rank", "train.epochs"]
    assert once.known_from("train.epochs") == Provenance("changed", "by --set; it was 6")
    again = presets.override(once, ["seeds=1"])
    assert sorted(again.changed()) == ["config.rank", "train.epochs", "train.seeds"]


@pytest.mark.parametrize(
    "change", ["rank=8", "learning_rate=9e-4", "max_records=none", "epochs=6", "seeds=42,43,44"]
)
def test_the_same_value_is_no_change(commonsense, change):
    assert presets.override(commonsense, [change]) == commonsense


def test_nothing_to_change(commonsense):
    assert presets.override(commonsense, []) == commonsense


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("rank", "a change must be KEY=VALUE, such as train.epochs=3; got 'rank'"),
        ("ranc=3", "no setting 'ranc' (did you mean 'rank'?); settings are config.intervention"),
        ("train.epoch=4", "no setting 'train.epoch' (did you mean 'train.epochs'"),
        ("config.epochs=4", "no setting 'config.epochs'"),
        ("published.average=99", "no setting 'published.average'"),
        ("name=x", "no setting 'name'"),
        ("format_version=1", "no setting 'format_version'"),
        ("base_model_name_or_path=x", "no setting 'base_model_name_or_path'"),
        ("=3", "no setting ''"),
        ("rank=four", "ReftConfig.rank must be an integer of at least 1, got 'four'"),
        ("rank=4.5", "ReftConfig.rank must be an integer of at least 1, got '4.5'"),
        ("rank=none", "ReftConfig.rank must be an integer of at least 1, got 'none'"),
        ("tied=1", "ReftConfig.tied must be True or False, got '1'"),
        ("layers=3,9", "ReftConfig.layers must be"),
        ("positions=f2+x", "ReftConfig.positions must be"),
        ("intervention=lorft", "did you mean 'loreft'?"),
        ("config.dtype=int8", "ReftConfig.dtype must be"),
        ("epochs=0", "train.epochs must be a number above 0, got 0.0"),
        ("epochs=nan", "train.epochs must be a number above 0, got nan"),
        ("batch_size=0", "batch_size must be an integer of at least 1 and below 2^63, got 0"),
        ("batch_size=1.5", "batch_size must be an integer of at least 1 and below 2^63, got '1.5'"),
        ("warmup=1", "train.warmup must be a number of at least 0 and below 1, got 1.0"),
        ("seeds=42,x", "train.seeds must be different integers such as 42,43, got (42, 'x')"),
        ("seeds=-1", "train.seeds must be different integers such as 42,43, got (-1,)"),
        ("max_records=0", "train.max_records must be None or an integer of at least 1"),
        ("dtype=int8", 'train.dtype must be "auto", "float32", "bfloat16" or "float16"'),
        ("sets=bool", "eval.sets must be boolq or piqa or"),
        ("sets=boolq,boolq", "eval.sets must be different names of sets"),
        ("sets=", "eval.sets must be different names of sets"),
        ("decoding=beam", "eval.decoding must be greedy or sampled for the task commonsense, got"),
        ("decoding=none", "eval.decoding must be greedy or sampled for the task commonsense, got"),
        ("scoring=exact", "eval.scoring must be pyreft or llm-adapters or none for the task"),
        ("split_rule=original", "eval.split_rule must be none for the task commonsense, got"),
        ("select_by=accuracy", "train.select_by must be none for the task commonsense, got"),
        ("label_dtype=bfloat16", "train.label_dtype must be none for the task commonsense, got"),
    ],
)
def test_refused(commonsense, change, words):
    with pytest.raises(ValueError) as raised:
        presets.override(commonsense, [change])
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{a = [0, 1], b = [2]}", {"a": [0, 1], "b": [2]}),
        ("none", None),
        ("a=0", "a=0"),  # left for the check of the field
    ],
)
def test_a_table_of_values(text, value):
    assert value_of(text, Mapping[str, Sequence[int]] | None) == value


def test_a_later_mistake_is_found_too(commonsense):
    with pytest.raises(ValueError, match="no setting 'x'"):
        presets.override(commonsense, ["rank=4", "x=1"])


# ------------------------------------------------------------------ by hand, in a copy


@pytest.fixture
def copy(tmp_path):
    """Make a copy of a preset with some lines replaced: (file, preset)."""

    def make(name: str, /, **lines: str):
        preset = presets.load(name)
        text = presets.to_toml(preset)
        for field, line in lines.items():
            old = next(
                written for written in text.splitlines() if written.startswith(f"{field} = ")
            )
            text = text.replace(f"\n{old}\n", f"\n{line}\n", 1)
        file = tmp_path / "mine.toml"
        file.write_text(text, encoding="utf-8")
        return file, preset

    return make


def test_what_is_edited_is_no_longer_the_papers(copy):
    file, _ = copy(
        "commonsense/llama-7b/loreft",
        rank="rank = 2",
        epochs="epochs = 1",
        average="average = 99.0",
    )
    preset = presets.load(file)
    assert (preset.config["rank"], preset.train.epochs, preset.published.average) == (2, 1, 99.0)
    assert sorted(preset.changed()) == ["config.rank", "published.average", "train.epochs"]
    assert preset.known_from("config.rank") == Provenance("changed", "in mine.toml; it was 8")
    # a copy of the copy is marked too
    file.write_text(presets.to_toml(preset), encoding="utf-8")
    assert presets.load(file) == preset


def test_a_new_name_hides_no_edit(copy):
    file, _ = copy("emoji/llama-2-7b-chat", name='name = "mine"', layers="layers = [3]")
    preset = presets.load(file)
    assert (preset.name, preset.changed()) == ("mine", ["config.layers"])


def test_another_spelling_is_no_edit(copy):
    file, _ = copy("ultrafeedback/llama-2-7b/loreft", layers='layers = "3;9;18;24"')
    assert presets.load(file).changed() == []


def test_a_field_that_is_added_or_left_out(copy):
    file, _ = copy("commonsense/llama-7b/loreft", rank='activation = "relu"', dropout="")
    changed = presets.load(file).changed()
    # rank 8 and dropout 0 are ReftConfig's defaults
    assert changed == ["config.activation"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ({"rank": "rank = 0"}, "ReftConfig.rank must be an integer of at least 1, got 0"),
        ({"rank": "ranc = 4"}, "ReftConfig has no field 'ranc' (did you mean 'rank'?)"),
        ({"epochs": "epoch = 4"}, "train has no field 'epoch' (did you mean 'epochs'?)"),
        ({"epochs": ""}, "train.epochs must be given"),
        ({"epochs": 'epochs = "six"'}, "train.epochs must be a number above 0, got 'six'"),
        ({"epochs": "epochs = true"}, "train.epochs must be a number above 0, got True"),
        ({"epochs": "epochs = inf"}, "train.epochs must be a number above 0, got inf"),
        ({"warmup": "warmup = 1.0"}, "train.warmup must be a number of at least 0 and below 1"),
        ({"seeds": "seeds = [4, 4]"}, "train.seeds must be different integers"),
        ({"seeds": "seeds = []"}, "train.seeds must be different integers"),
        ({"seeds": "seeds = [[1]]"}, "train.seeds must be different integers"),
        ({"schedule": 'schedule = "linea"'}, 'train.schedule must be "linear", "cosine",'),
        ({"task": 'task = "comonsense"'}, "no task 'comonsense' (did you mean 'commonsense'"),
        ({"sets": 'sets = ["cola"]'}, "eval.sets must be boolq or piqa or"),
        ({"split": 'split = "tests"'}, 'eval.split must be "train", "validation",'),
        ({"decoding": 'decoding = "beam"'}, "eval.decoding must be greedy or sampled for the task"),
        ({"scores": "scores = 3"}, "published.scores must be a table of numbers, got 3"),
        ({"hub_id": ""}, "hub_id must be given"),
        ({"hub_id": "hub_id = 3"}, "preset.hub_id must be a string that is not empty, got 3"),
        ({"title": "titel = 3"}, "has no field 'titel' (did you mean 'title'?)"),
        ({"title": "title = "}, "is not TOML"),
        ({"train": 'train = "seen: it"'}, "provenance of train must be '<status>: <source>'"),
    ],
)
def test_bad_files(copy, lines, words):
    file, _ = copy("commonsense/llama-7b/loreft", **lines)
    with pytest.raises(ValueError) as raised:
        presets.load(file)
    assert words in str(raised.value)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ({"select_by": 'select_by = "pearson"'}, "train.select_by must be accuracy for the task"),
        ({"select_by": ""}, "train.select_by must be accuracy for the task glue/rte with an eval"),
        ({"split_rule": ""}, "train.select_by must be none for the task glue/rte without an eval"),
        ({"batch_size": ""}, "must be given"),
        ({"sets": 'sets = ["cola"]'}, "eval.sets must be rte for the task glue/rte, got 'cola'"),
    ],
)
def test_bad_files_of_classifiers(copy, lines, words):
    file, _ = copy("glue/roberta-base/rte/loreft", **lines)
    with pytest.raises(ValueError) as raised:
        presets.load(file)
    assert words in str(raised.value)


def test_names_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'commonsense/llama-7b/loreft'"):
        presets.load("commonsense/llama7b/loreft")
    with pytest.raises(ValueError, match="no preset 'qwertz'; `reft presets list`"):
        presets.load("qwertz")
    with pytest.raises(FileNotFoundError, match=r"no such preset file: .*absent\.toml"):
        presets.load(tmp_path / "absent.toml")


@pytest.mark.parametrize("values", [3, [], {"name": "x"}])
def test_what_is_no_preset(values):
    with pytest.raises(ValueError, match=r"must be (a table|given)"):
        Preset.from_dict(values)
