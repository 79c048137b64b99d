"""`reft evaluate` and `reft generate`: an adapter and its base model, and the ends of answers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reft.config import ReftConfig
from reft.model.reft_model import ReftModel, get_reft_model
from reft.train.evaluate import evaluate

SHARED = ("-m", "model", "--device", "cpu", "--max-new-tokens", "4")
TRAIN = ("train", "-m", "model", "-d", "data.jsonl", "-o", "out", "--device", "cpu")
LEARN = ("--rank", "4", "--positions", "all", "--lr", "0.02", "--steps", "60", "--batch-size", "6")


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def known_records(model, tokenizer, records):
    """Replace the completions of records by the answers of the base model."""
    asked = [{**record, "completion": "?"} for record in records]
    predictions = evaluate(model, tokenizer, asked, max_new_tokens=4).predictions
    return [
        {"prompt": prediction.prompt, "completion": prediction.prediction}
        for prediction in predictions
    ]


@pytest.fixture
def adapter(place):
    """Make an adapter with a large random edit, whose answers differ from the base model's."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    model = get_reft_model(base, ReftConfig(rank=4, positions="prompt"))
    with torch.no_grad():
        for parameter in model._registry.adapter("default").parameters():
            parameter.add_(torch.randn_like(parameter) * 3)
    model.save_pretrained(place / "adapter")
    return "adapter"


def test_an_adapter_is_shown_beside_its_base(
    place, reft, adapter, word_llama, word_tokenizer, color_records
):
    known = known_records(word_llama, word_tokenizer, color_records)
    changed = ReftModel.from_pretrained(word_llama, place / "adapter")
    adapted = known_records(changed, word_tokenizer, color_records)
    differing = [at for at in range(12) if known[at] != adapted[at]]
    assert len(differing) >= 4
    # Among the answers that differ, three of the adapter's are right and one of the base model's.
    picked = [adapted[at] for at in differing[:3]] + [known[differing[3]]]
    write(place / "data.jsonl", picked)
    command = ("evaluate", *SHARED, "-d", "data.jsonl")
    code, out, _ = reft(*command, "-a", adapter, "-o", "both.jsonl")
    assert (code, out.splitlines()) == (
        0,
        ["exact match 0.7500 (3 of 4)", "its base: exact match 0.2500 (1 of 4)"],
    )
    rows = read(place / "both.jsonl")
    assert [row["correct"] for row in rows] == [True, True, True, False]
    assert [row["base_correct"] for row in rows] == [False, False, False, True]
    assert [row["base_prediction"] for row in rows] == [
        known[at]["completion"] for at in differing[:4]
    ]
    # The base model without an adapter has the same score.
    assert reft(*command, "-o", "base.jsonl")[:2] == (0, "exact match 0.2500 (1 of 4)\n")
    base = read(place / "base.jsonl")
    assert [row["prediction"] for row in base] == [row["base_prediction"] for row in rows]
    assert set(base[0]) == {"prompt", "completion", "prediction", "correct"}
    code, out, _ = reft(*command, "-a", adapter, "--no-base", "-o", "alone.jsonl")
    assert (code, out) == (0, "exact match 0.7500 (3 of 4)\n")
    assert [{name: row[name] for name in base[0]} for row in rows] == read(place / "alone.jsonl")


@pytest.mark.parametrize(
    ("right", "says"),
    [
        ("base", ["exact match 0.0000 (0 of 2)", "its base: exact match 1.0000 (2 of 2)", "worse"]),
        (
            "both",
            ["exact match 0.5000 (1 of 2)", "its base: exact match 0.5000 (1 of 2)", "no "],
        ),
        (
            "none",
            ["exact match 0.0000 (0 of 2)", "its base: exact match 0.0000 (0 of 2)", "no "],
        ),
    ],
)
def test_an_adapter_that_is_no_better_is_said_to_be_so(
    place, reft, adapter, word_llama, word_tokenizer, color_records, right, says
):
    known = known_records(word_llama, word_tokenizer, color_records)
    changed = ReftModel.from_pretrained(word_llama, place / "adapter")
    adapted = known_records(changed, word_tokenizer, color_records)
    first, second = [at for at in range(12) if known[at] != adapted[at]][:2]
    wrong = [{**known[at], "completion": "h h"} for at in (first, second)]
    data = {"base": [known[first], known[second]], "both": [known[first], adapted[second]]}
    write(place / "data.jsonl", data.get(right, wrong))
    code, out, _ = reft("evaluate", *SHARED, "-d", "data.jsonl", "-a", adapter, "--limit", "2")
    lines = out.splitlines()
    assert (code, lines[:2]) == (0, says[:2])
    assert says[2] in lines[2]
    assert "its base" in lines[2]


def test_answers_end_where_training_ends_them(place, reft, color_records):
    """The end token of the tokenizer is missing in the model's generation config."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer.eos_token = "?"
    tokenizer.save_pretrained(place / "model")
    path = place / "model" / "generation_config.json"
    settings = json.loads(path.read_text())
    assert settings["eos_token_id"] == tokenizer.convert_tokens_to_ids("<eos>")
    assert reft(*TRAIN, *LEARN)[0] == 0
    for ends in (settings["eos_token_id"], tokenizer.convert_tokens_to_ids(["c", "d"]), None):
        path.write_text(json.dumps(settings | {"eos_token_id": ends}))
        code, out, _ = reft("evaluate", *SHARED, "-d", "data.jsonl", "-a", "out", "--no-base")
        assert (code, out) == (0, "exact match 1.0000 (12 of 12)\n")
        assert reft("generate", *SHARED, "-a", "out", "-p", "b : three")[1] == "blue\n"


def test_prompts_of_a_chat_are_those_of_training(place, reft, color_records):
    """Rendered prompts start with the start token, and answers end with the end token."""
    rendered = [
        {"prompt": f"<bos> {record['prompt']}", "completion": f"{record['completion']} <eos>"}
        for record in color_records
    ]
    assert reft(*TRAIN, *LEARN)[0] == 0  # on plain prompts
    plain = reft("generate", *SHARED, "-a", "out", "-d", "data.jsonl")[1]
    write(place / "rendered.jsonl", rendered)
    assert reft("generate", *SHARED, "-a", "out", "-d", "rendered.jsonl")[1] == plain
    code, out, _ = reft("evaluate", *SHARED, "-a", "out", "-d", "rendered.jsonl", "--no-base")
    assert (code, out) == (0, "exact match 1.0000 (12 of 12)\n")
