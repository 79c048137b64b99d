"""ReftConfig: accepted values, error messages, and the JSON round trip."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reft.config import FORMAT_VERSION, HEAD_MODULES, ReftConfig
from reft_kernels.activations import ACTIVATIONS, ALIASES
from reft_kernels.spec import FAMILY

#: A value other than the default for each field. The tests fail for a field without one.
OTHER = {
    "intervention": "direft",
    "rank": 3,
    "layers": (0, 2, -1),
    "positions": "l1",
    "tied": False,
    "activation": "gelu",
    "dropout": 0.25,
    "dropout_on": "row",
    "component": "block_output",  # the only one there is
    "init": "identity",
    "dtype": "bfloat16",
    "short_prompts": "paper",
    "prompt_end": "second_to_last",
    "modules_to_save": ("classifier", "score"),
    "task_type": "SEQ_CLS",
    "block_path": "model.layers",
    "untied_by": "position",
    "subspaces": (("polite", (0, 2)), ("german", (1,))),
    "base_model_name_or_path": "some/model",
    "format_version": FORMAT_VERSION,  # whatever was read
}

#: Other fields that such a value requires.
NEEDS = {"untied_by": {"tied": False}}

NAMES = [field.name for field in fields(ReftConfig)]


def test_every_field_has_another_value_to_test_with():
    assert list(OTHER) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_field_survives_json(name):
    config = ReftConfig(**{name: OTHER[name]}, **NEEDS.get(name, {}))
    assert getattr(config, name) == OTHER[name]
    back = ReftConfig.from_json(config.to_json())
    assert back == config
    assert getattr(back, name) == OTHER[name]
    assert type(getattr(back, name)) is type(OTHER[name])
    # Equality must compare the field, or the line above tests nothing.
    if OTHER[name] != getattr(ReftConfig(), name):
        assert back != ReftConfig()


counts = st.integers(1, 99)
positions = st.one_of(
    st.sampled_from(["prompt", "all"]),
    counts.map(lambda n: f"f{n}"),
    counts.map(lambda n: f"l{n}"),
    st.tuples(counts, counts).map(lambda pair: f"f{pair[0]}+l{pair[1]}"),
)
layer_lists = st.lists(st.integers(-80, 80), min_size=1, max_size=8, unique=True)
configs = st.builds(
    ReftConfig,
    intervention=st.sampled_from(sorted(FAMILY)),
    rank=st.integers(1, 4096),
    layers=st.one_of(
        st.just("all"),
        layer_lists,
        layer_lists.map(tuple),
        layer_lists.map(lambda layers: ";".join(map(str, layers))),
    ),
    positions=positions,
    tied=st.booleans(),
    activation=st.sampled_from([None, *sorted(ACTIVATIONS), *sorted(ALIASES)]),
    dropout=st.one_of(st.just(0), st.floats(0, 1, exclude_max=True)),
    dropout_on=st.sampled_from(["delta", "row"]),
    init=st.sampled_from(["pyreft", "identity"]),
    dtype=st.sampled_from(["float32", "float64", torch.bfloat16, torch.float16]),
    short_prompts=st.sampled_from(["pyreft", "paper"]),
    prompt_end=st.sampled_from(["last", "second_to_last"]),
    modules_to_save=st.none() | st.lists(st.text(min_size=1), max_size=3),
    task_type=st.sampled_from([None, *HEAD_MODULES]),
    block_path=st.none() | st.text(),
    subspaces=st.none()
    | st.dictionaries(st.text(min_size=1), st.just([0]), min_size=1, max_size=3),
    base_model_name_or_path=st.none() | st.text(),
)


@settings(max_examples=150, deadline=None)
@given(configs)
def test_any_configuration_survives_json_and_dict(config):
    assert ReftConfig.from_json(config.to_json()) == config
    assert ReftConfig.from_dict(config.to_dict()) == config
    assert hash(ReftConfig.from_json(config.to_json())) == hash(config)
    assert list(json.loads(config.to_json())) == NAMES


def test_defaults_are_the_papers_commonsense_run():
    config = ReftConfig()
    assert (config.intervention, config.rank, config.layers, config.positions) == (
        "loreft",
        8,
        "all",
        "f7+l7",
    )
    assert config.tied is True
    assert config.dtype == "float32"
    assert config.torch_dtype is torch.float32
    assert config.spec is FAMILY["loreft"]


def test_a_configuration_cannot_be_changed_but_can_be_replaced():
    config = ReftConfig(layers=[1, 2])
    with pytest.raises(FrozenInstanceError):
        config.rank = 3  # type: ignore[misc]
    assert replace(config, rank=3) == ReftConfig(layers=[1, 2], rank=3)
    with pytest.raises(ValueError, match="rank"):
        replace(config, rank=0)


@pytest.mark.parametrize("layers", [[2, 5], (2, 5), "2;5"], ids=["list", "tuple", "string"])
def test_all_spellings_of_layers_are_equal(layers):
    assert ReftConfig(layers=layers) == ReftConfig(layers=[2, 5])
    assert ReftConfig(layers=layers).resolve_layers(6) == (2, 5)


@pytest.mark.parametrize(
    ("layers", "resolved"),
    [("all", (0, 1, 2, 3)), ([3, 0], (0, 3)), ([-1], (3,)), ("-4;1", (0, 1)), ([0], (0,))],
)
def test_layers_resolve_in_ascending_order(layers, resolved):
    assert ReftConfig(layers=layers).resolve_layers(4) == resolved


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([4], ["layers", "0 … 3", "got 4"]),
        ([-5], ["layers", "−4 … −1", "got -5"]),
        ([3, -1], ["layers", "3 and -1", "layer 3 of 4"]),
    ],
)
def test_layers_the_model_does_not_have_are_refused(layers, says):
    config = ReftConfig(layers=layers)
    with pytest.raises(ValueError) as caught:
        config.resolve_layers(4)
    for text in says:
        assert text in str(caught.value)


BAD = [
    ("intervention", "lorft", ["'lorft'", "did you mean 'loreft'?", "consreft"]),
    ("intervention", None, ["None", "direft"]),
    ("rank", 0, ["0", "at least 1"]),
    ("rank", -2, ["-2", "at least 1"]),
    ("rank", 2.0, ["2.0", "integer"]),
    ("rank", True, ["True", "integer"]),
    ("rank", "8", ["'8'", "integer"]),
    ("layers", "some", ["'some'", "3;9;18;24"]),
    ("layers", "3;", ["'3;'", "3;9;18;24"]),
    ("layers", [], ["[]", "list of different layer numbers"]),
    ("layers", [1, 1], ["[1, 1]", "list of different layer numbers"]),
    ("layers", [1.5], ["[1.5]", "list of different layer numbers"]),
    ("layers", [True], ["[True]", "list of different layer numbers"]),
    ("layers", 3, ["3", "list of different layer numbers"]),
    ("positions", "7", ["'7'", "f7+l7", "prompt", "all"]),
    ("positions", None, ["None", "f7+l7"]),
    ("tied", 1, ["1", "True or False"]),
    ("activation", "reluu", ["'reluu'", "did you mean 'relu'?", "silu"]),
    ("activation", 3, ["3", "relu"]),
    ("dropout", 1, ["1", "of at least 0 and below 1"]),
    ("dropout", -0.1, ["-0.1", "of at least 0 and below 1"]),
    ("dropout", float("nan"), ["nan", "of at least 0 and below 1"]),
    ("dropout", "0.1", ["'0.1'", "of at least 0 and below 1"]),
    ("dropout", False, ["False", "of at least 0 and below 1"]),
    ("dropout_on", "all", ["'all'", "delta", "row"]),
    ("component", "mlp_outptu", ["'mlp_outptu'", "block_output", "did you mean 'mlp_output'?"]),
    ("component", "module:", ["'module:'", "module:<path>"]),
    ("component", None, ["None", "attention_output"]),
    ("init", "zeros", ["'zeros'", "pyreft", "identity"]),
    ("dtype", "fp32", ["'fp32'", "float32", "bfloat16"]),
    ("dtype", torch.int8, ["'int8'", "float32"]),
    ("short_prompts", "pyrft", ["'pyrft'", "did you mean 'pyreft'?"]),
    ("prompt_end", "first", ["'first'", "second_to_last"]),
    ("modules_to_save", "classifier", ["'classifier'", "list of module names"]),
    ("modules_to_save", [""], ["['']", "list of module names"]),
    ("task_type", "SEQ_CLASS", ["'SEQ_CLASS'", "did you mean 'SEQ_CLS'?", "CAUSAL_LM"]),
    ("block_path", 3, ["3", "string"]),
    ("untied_by", "positions", ["'positions'", "did you mean 'position'?"]),
    ("untied_by", "position", ["tied=False", "tied=True", "'f7+l7'"]),
    ("subspaces", {}, ["numbers from 0 to 7", "{}"]),
    ("subspaces", 3, ["numbers from 0 to 7", "3"]),
    ("subspaces", {"a": [8]}, ["numbers from 0 to 7", "'a': [8]"]),
    ("subspaces", {"a": [1, 1]}, ["different", "[1, 1]"]),
    ("subspaces", {"a": []}, ["'a': []"]),
    ("subspaces", {"a": "01"}, ["'a': '01'"]),
    ("subspaces", {"": [0]}, ["'': [0]"]),
    ("subspaces", {"a": [True]}, ["[True]"]),
    ("base_model_name_or_path", 3, ["3", "string"]),
    ("format_version", 0, [f"must be {FORMAT_VERSION}, got 0"]),
    ("format_version", "2", [f"must be {FORMAT_VERSION}, got '2'"]),
    ("format_version", True, [f"must be {FORMAT_VERSION}, got True"]),
    ("format_version", 1.0, [f"must be {FORMAT_VERSION}, got 1.0"]),
    ("format_version", None, [f"must be {FORMAT_VERSION}, got None"]),
    (
        "format_version",
        FORMAT_VERSION + 1,
        [f"must be {FORMAT_VERSION}, got {FORMAT_VERSION + 1}; a newer version of reft wrote it"],
    ),
]


@pytest.mark.parametrize(("name", "value", "says"), BAD, ids=[f"{n}={v!r}" for n, v, _ in BAD])
def test_a_bad_value_is_refused_by_name_value_and_what_is_allowed(name, value, says):
    with pytest.raises(ValueError) as caught:
        ReftConfig(**{name: value})
    message = str(caught.value)
    assert f"ReftConfig.{name}" in message
    for text in says:
        assert text in message
    with pytest.raises(ValueError) as again:
        ReftConfig.from_dict({name: value})
    assert str(again.value) == message


def test_every_field_has_a_refused_value():
    assert {name for name, _, _ in BAD} == set(NAMES)


def test_an_unknown_field_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"no field 'dropuot' \(did you mean 'dropout'\?\)"):
        ReftConfig.from_dict({"dropuot": 0.1})
    with pytest.raises(ValueError, match=r"no field 'zzz'; its fields are intervention, rank"):
        ReftConfig.from_json('{"zzz": 1}')


def test_a_newer_format_is_named_before_its_unknown_fields():
    with pytest.raises(ValueError, match="format_version"):
        ReftConfig.from_dict({"new_field": 1, "format_version": FORMAT_VERSION + 1})


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"rank": 1,}'])
def test_what_is_not_a_mapping_in_json_is_refused(text):
    with pytest.raises(ValueError, match="ReftConfig"):
        ReftConfig.from_json(text)


@pytest.mark.parametrize(
    ("positions", "tied", "groups"),
    [
        ("f7+l7", False, 2),
        ("f7+l7", True, 1),
        ("f7", False, 1),
        ("l1", False, 1),
        ("all", False, 1),
    ],
)
def test_untied_weights_are_two_groups_only_where_there_are_two_sides(positions, tied, groups):
    assert ReftConfig(positions=positions, tied=tied).num_groups == groups


CLASSIFIER = ["", "bert", "bert.encoder", "bert.encoder.classifier", "classifier", "classifier.out"]


@pytest.mark.parametrize(
    ("kwargs", "resolved"),
    [
        ({}, ()),
        ({"task_type": "CAUSAL_LM"}, ()),
        ({"task_type": "QUESTION_ANS"}, ()),
        ({"task_type": "SEQ_CLS"}, ("bert.encoder.classifier", "classifier")),
        ({"task_type": "TOKEN_CLS"}, ("bert.encoder.classifier", "classifier")),
        ({"modules_to_save": ["classifier.out"]}, ("classifier.out",)),
        ({"modules_to_save": ["classifier", "out"]}, ("bert.encoder.classifier", "classifier")),
        ({"modules_to_save": ["bert"], "task_type": "SEQ_CLS"}, ("bert", "classifier")),
    ],
)
def test_heads_are_found_by_the_end_of_their_name_and_only_outermost(kwargs, resolved):
    assert ReftConfig(**kwargs).resolve_modules_to_save(CLASSIFIER) == resolved


def test_a_module_to_save_that_the_model_lacks_is_refused():
    config = ReftConfig(modules_to_save=["clasifier"])
    with pytest.raises(ValueError, match=r"'clasifier' \(did you mean 'classifier'\?\)"):
        config.resolve_modules_to_save(CLASSIFIER)
    # "fier" is the end of a module's name, but not a whole name.
    with pytest.raises(ValueError, match="'fier'"):
        ReftConfig(modules_to_save=["fier"]).resolve_modules_to_save(CLASSIFIER)
