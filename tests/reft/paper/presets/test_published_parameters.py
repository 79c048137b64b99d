"""Parameter counts of the paper, from meta models with the shapes of its base models."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from paper_models import build, paper_model

from reft import get_reft_model
from reft.adapter.parameters import AdapterParameters
from reft.paper.presets import load, names

#: Percentages of trainable parameters as printed in arXiv 2404.03592v3.
PERCENTAGES = list(
    csv.DictReader((Path(__file__).parent / "published_percentages.csv").open(encoding="utf-8"))
)

#: Printed numbers of parameters: (place, preset, number).
COUNTS = [
    ("appendix F, memorisation", "memorisation/llama-7b", 4097),
    ("appendix F, memorisation", "memorisation/llama-13b", 5121),
    ("README of pyreft, emoji", "emoji/llama-2-7b-chat", 32_772),
    ("a log of pyreft's command", "commonsense/llama-7b/loreft", 2_097_408),
]


def adapter_parameters(name: str) -> int:
    """Count the trainable parameters of a preset without a classifier's head."""
    preset = load(name)
    model = get_reft_model(paper_model(preset.model), preset.reft_config())
    try:
        banks = [module for module in model.modules() if isinstance(module, AdapterParameters)]
        assert len(banks) == 1
        count = sum(parameter.numel() for parameter in banks[0].parameters())
        trained, _ = model.get_nb_trainable_parameters()
        heads = trained - count
        assert heads > 0 if preset.task.startswith("glue/") else heads == 0
    finally:
        model.unload()
    return count


def test_the_table_is_whole():
    assert len(PERCENTAGES) == 44
    assert {row["table"] for row in PERCENTAGES} == {*"1234", "13", "14", "15", "16", "17"}


@pytest.mark.parametrize(
    "row", PERCENTAGES, ids=lambda row: f"Table {row['table']} {row['model']} {row['method']}"
)
def test_published_percentage(row):
    preset, digits = load(row["preset"]), len(row["percent"].partition(".")[2])
    assert preset.model == row["model"]
    base = paper_model(row["model"]).num_parameters()
    computed = 100 * adapter_parameters(row["preset"]) / base
    assert f"{computed:.{digits}f}" == row["percent"]
    assert preset.published.percent == float(row["percent"])


@pytest.mark.parametrize(("what", "name", "published"), COUNTS)
def test_published_count(what, name, published):
    assert adapter_parameters(name) == published, what


def test_published_count_of_the_base_model():
    assert paper_model("Llama-2-chat 7B").num_parameters() == 6_738_415_616


@pytest.mark.peer
def test_published_count_of_the_lora_beside_it():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["o_proj"], layers_to_transform=[15])
    with torch.device("meta"):
        model = peft.get_peft_model(build("Llama-2 7B"), config)
    assert model.get_nb_trainable_parameters()[0] == 32_768


def with_params() -> list[str]:
    return [name for name in names() if load(name).published.params is not None]


@pytest.mark.parametrize("name", with_params())
def test_the_presets_own_count(name):
    assert adapter_parameters(name) == load(name).published.params


def test_presets_without_a_count_have_nothing_published():
    for name in set(names()) - set(with_params()):
        published = load(name).published
        assert (published.percent, published.scores, published.average) == (None, {}, None)
