"""Batches for training and evaluation equal those of the published code token by token, and so do
the scores. ``make_task_golden.py`` ran both."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import edited_rows_of
from transformers import AutoTokenizer

from reft import ReftConfig, ReftDataCollator
from reft.model.prompts import PromptSpans
from reft.paper.tasks import ClassificationTask, answers, get_task
from reft.paper.tasks.encode import encode_example, encode_prompt

GOLDEN = Path(__file__).parent / "golden" / "tasks"
DATA = Path(__file__).parents[1] / "reft" / "paper" / "task_data"
STORED = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
TENSORS = load_file(GOLDEN / "batches.safetensors")
ANSWERS = json.loads((GOLDEN / "answers.json").read_text(encoding="utf-8"))


def records(name: str) -> list[dict]:
    if name == "../short":
        return STORED["short"]
    [path] = DATA.glob(f"{name}.json*")
    text = path.read_text(encoding="utf-8")
    if text.startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines()]


def edited(case: dict, mask: torch.Tensor, lengths: list[int]) -> list[list[set[int]]]:
    """Return the columns that this library edits, by group and sequence."""
    config = ReftConfig(positions=case["positions"], tied=case["tied"])
    start = mask.argmax(dim=1)
    prompt = PromptSpans(start, torch.tensor(lengths))
    width = mask.shape[1]
    groups = edited_rows_of(config, prompt, width)
    edited_columns = []
    for rows in groups:
        columns: list[set[int]] = [set() for _ in lengths]
        for row in rows.tolist():
            if row >= 0:
                columns[row // width].add(row % width)
        edited_columns.append(columns)
    return edited_columns


def theirs_edited(case: dict, locations: torch.Tensor, shift: int, sink: list[int]):
    """Return the same from the published positions, which point at an extra token where nothing is
    edited. They have the shape (sequences, interventions, positions); the first half of untied
    interventions is the prefix."""
    groups = 1 if case["tied"] or "+" not in case["positions"] else 2
    each = locations.shape[1] // groups
    # Every layer edits the same.
    assert all((locations[:, at] == locations[:, at // each * each]).all() for at in range(each))
    return [
        [
            {int(place) - shift for place in locations[row, group * each]} - {sink[row]}
            for row in range(len(locations))
        ]
        for group in range(groups)
    ]


@pytest.mark.parametrize("name", STORED["cases"])
def test_a_batch_is_the_published_codes(name):
    case = STORED["cases"][name]
    task = get_task(case["task"])
    classify = isinstance(task, ClassificationTask)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / ("roberta" if classify else "llama"))
    theirs = {
        key.rpartition("/")[2]: value
        for key, value in TENSORS.items()
        if key.rpartition("/")[0] == name
    }
    rows = records(case["file"])
    if case["split"] == "train":
        features = [encode_example(task, row, tokenizer, case["max_length"]) for row in rows]
        ours = ReftDataCollator(tokenizer, prompt_lengths=not classify)(features)
        lengths = (ours["attention_mask"].sum(1) if classify else ours["prompt_lengths"]).tolist()
        # The token that nothing attends to stands behind the text of a classification, else before.
        cut = slice(0, -1) if classify else slice(1, None)
    else:
        prompts = [encode_prompt(task, row, tokenizer, case["max_length"]) for row in rows]
        width, lengths = max(map(len, prompts)), [len(prompt) for prompt in prompts]
        ours = {
            "input_ids": torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts]),
            "attention_mask": torch.tensor(
                [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
            ),
        }
        # Padded on the left: theirs begins one column further left.
        cut = slice(1, None)
    mask = theirs["attention_mask"][:, cut]
    attended = ours["attention_mask"].bool()
    # <unk> is their padding, so that an unknown word inside a text is masked too; none is here.
    assert torch.equal(mask.bool(), attended)
    assert torch.equal(
        theirs["input_ids"][:, cut].masked_fill(~attended, 0),
        ours["input_ids"].masked_fill(~attended, 0),
    )
    if "labels" in theirs:
        labels = theirs["labels"] if classify else theirs["labels"][:, cut]
        assert torch.equal(labels.to(ours["labels"].dtype), ours["labels"])
    shift = 0 if classify else 1
    if classify:
        sink = lengths
    elif case["split"] == "train":
        sink = [-1] * len(rows)
    else:
        sink = [mask.shape[1] - length - 1 for length in lengths]
    wanted = theirs_edited(case, theirs["intervention_locations"], shift, sink)
    assert edited(case, ours["attention_mask"], lengths) == wanted
    assert any(group for columns in wanted for group in columns)


def test_the_cases_have_what_is_hard():
    """The cases include short and truncated prompts, tied and untied weights, and examples without
    labels."""
    short = TENSORS["commonsense-short/intervention_locations"]
    assert (short == 0).any()  # the token that stands for "nothing"
    labels = TENSORS["commonsense-cut/labels"]
    assert ((labels != -100).sum(1) == 0).any()
    assert ((labels != -100).sum(1) > 0).any()
    assert TENSORS["rte-cut/input_ids"].shape[1] == 17


@pytest.mark.parametrize("trigger", ANSWERS["output"])
def test_what_follows_the_trigger(trigger):
    read = [answers.after_trigger(text, trigger) for text in ANSWERS["texts"]]
    assert read == ANSWERS["output"][trigger]


@pytest.mark.parametrize("who", ["number", "llm_number"])
def test_numbers(who):
    read = [answers.last_number(text) for text in ANSWERS["texts"]]
    assert read == [math.inf if number is None else number for number in ANSWERS[who]]
    assert len(set(read)) > 10


@pytest.mark.parametrize("who", ["letter", "llm_letter"])
def test_letters(who):
    assert [answers.first_letter(text) for text in ANSWERS["texts"]] == ANSWERS[who]


@pytest.mark.parametrize("name", ANSWERS["choice"])
def test_choices(name):
    rule = get_task("commonsense").scorings["llm-adapters"]
    record = {"instruction": "Q", "answer": "x"}
    read = [rule(f"Q\n{text}", record, name).answer for text in ANSWERS["texts"]]
    assert read == ANSWERS["choice"][name]
    assert len(set(read)) > 1
