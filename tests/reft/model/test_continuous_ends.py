"""Continuous batching ends answers where ``generate`` does: what the settings leave open is the
model's."""

from __future__ import annotations

import copy

import pytest
import torch
from batching import make_model, prompts, settings
from transformers import GenerationConfig

NAMES = ["ends", "untied", "__base__", "prompt"]
INPUTS = prompts([5, 12, 30, 3])
STEPS = 12


@pytest.fixture(scope="module")
def model():
    return make_model()


def generated(model, given: GenerationConfig | None) -> list[list[int]]:
    """Each prompt alone, by ``generate``."""
    answers = []
    for ids, name in zip(INPUTS, NAMES, strict=True):
        prompt = torch.tensor([ids])
        whole = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=copy.deepcopy(given),
            adapter_names=[name],
        )
        answers.append(whole[0, len(ids) :].tolist())
    return answers


@pytest.fixture
def ends(model, monkeypatch):
    """Gives the base two tokens that end answers: ones it generates early."""
    free = generated(model, GenerationConfig(max_new_tokens=STEPS, do_sample=False))
    assert all(len(each) == STEPS for each in free)
    tokens = [free[0][3], free[3][1]]
    monkeypatch.setattr(model.get_base_model().generation_config, "eos_token_id", tokens)
    return tokens


def as_generate(model, given):
    wanted = generated(model, given)
    outputs = model.generate_batch(INPUTS, given, settings(), adapter_names=NAMES)
    assert [each.generated_tokens for each in outputs.values()] == wanted
    return wanted


@pytest.mark.parametrize("kind", ["two ends", "one end"])
def test_answers_end_where_they_end_in_generate(kind, model, ends, monkeypatch):
    settings_of_base = model.get_base_model().generation_config
    if kind == "one end":
        monkeypatch.setattr(settings_of_base, "eos_token_id", ends[0])
    given = GenerationConfig(max_new_tokens=STEPS, do_sample=False)
    before = given.to_dict(), settings_of_base.to_dict()
    wanted = as_generate(model, given)
    assert len(wanted[0]) <= 4 and wanted[0][-1] in ends
    assert (given.to_dict(), settings_of_base.to_dict()) == before, (
        "settings of the caller were written"
    )


def test_what_the_caller_says_comes_first(model, ends):
    given = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=-1)
    outputs = model.generate_batch(INPUTS, given, settings(), adapter_names=NAMES)
    assert all(len(each.generated_tokens) == STEPS for each in outputs.values())


def test_the_settings_of_the_model_alone(model, ends, monkeypatch):
    settings_of_base = model.get_base_model().generation_config
    monkeypatch.setattr(settings_of_base, "max_new_tokens", STEPS)
    monkeypatch.setattr(settings_of_base, "do_sample", False)
    as_generate(model, None)


def test_a_penalty_of_the_model_counts(model, ends, monkeypatch):
    """Not the ends alone: all that ``generate`` takes of the model."""
    given = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=-1)
    monkeypatch.setattr(model.get_base_model().generation_config, "suppress_tokens", ends)
    wanted = as_generate(model, given)
    assert all(token not in ends for each in wanted for token in each)


def test_requests_that_are_streamed(model, ends):
    given = GenerationConfig(max_new_tokens=STEPS, do_sample=False)
    wanted = generated(model, given)
    how = {"continuous_batching_config": settings()}
    with model.continuous_batching_context_manager(given, **how) as manager:
        for ids, name, tokens in zip(INPUTS, NAMES, wanted, strict=True):
            request = manager.add_request(ids, adapter_name=name, streaming=True)
            *_, last = manager.request_id_iter(request)
            assert last.generated_tokens == tokens


def test_without_adapters_named(ends, model):
    """The active adapter, of a model with another one."""
    given = GenerationConfig(max_new_tokens=STEPS, do_sample=False)
    outputs = model.generate_batch(INPUTS[:1], given, settings())
    [output] = outputs.values()
    assert output.generated_tokens == generated(model, given)[0]
