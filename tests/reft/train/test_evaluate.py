"""Batched greedy generation against single prompts, and the score of the completions."""

from __future__ import annotations

import copy
import io
import json
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console
from transformers import GenerationConfig

from reft.config import ReftConfig
from reft.train.collate import ReftDataCollator
from reft.train.evaluate import (
    Evaluation,
    Prediction,
    context_length,
    evaluate,
    exact_match,
    generate_completions,
)

PROMPTS = ["a", "one two three four five a b c d", "red green", "a b c d e", "yes"]


@torch.no_grad()
def one_by_one(model, tokenizer, prompt: str, new: int) -> str:
    """Greedy decoding without a batch, padding, mask or cache."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    for _ in range(new):
        step = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, step], dim=1)
        if int(step) == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_padded_batch_equals_single_prompts(word_llama, word_tokenizer, batch_size):
    expected = [one_by_one(word_llama, word_tokenizer, prompt, 6) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    answers = generate_completions(
        word_llama, word_tokenizer, PROMPTS, batch_size=batch_size, max_new_tokens=6
    )
    assert answers == expected


@contextmanager
def predicting(model, tokenizer, *words):
    """Make the output layer predict these words; yield the ids predicted so far."""
    script, produced = tokenizer.convert_tokens_to_ids(list(words)), []

    def predict(module, arguments, output):
        produced.append(script[len(produced)])
        return torch.nn.functional.one_hot(
            torch.full(output.shape[:-1], produced[-1]), output.shape[-1]
        ).float()

    handle = model.lm_head.register_forward_hook(predict)
    yield produced
    handle.remove()


#: End tokens of the generation config, options of generate, the predicted words, how many of them
#: are generated, and the completion.
ENDS = {
    "both": ("<eos>", {}, "yes <eos> no no no", 2, "yes"),
    "the-tokenizers-alone": ("red", {}, "yes <eos> no no no", 2, "yes"),
    "the-configs-alone": ("red", {}, "yes red no no no", 2, "yes"),
    "several": ("red blue", {}, "yes no blue no no", 3, "yes no"),
    "several-and-another": ("red blue", {}, "yes no <eos> no no", 3, "yes no"),
    "no-config": ("", {}, "yes <eos> no no no", 2, "yes"),
    "given": ("red", {"eos_token_id": "green"}, "yes <eos> red green no", 4, "yes red"),
    "given-several": ("", {"eos_token_id": "green blue"}, "yes <eos> blue no no", 3, "yes"),
    "given-config": ("red", {"generation_config": "blue"}, "yes red blue no no", 3, "yes red"),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_completion_ends_at_the_ends_of_tokenizer_and_model(word_llama, word_tokenizer, case):
    configured, options, script, steps, shown = ENDS[case]

    def ids(words):
        tokens = word_tokenizer.convert_tokens_to_ids(words.split())
        return tokens[0] if len(tokens) == 1 else tokens or None

    word_llama.generation_config.eos_token_id = ids(configured)
    options = {name: ids(words) for name, words in options.items()}
    if "generation_config" in options:
        options["generation_config"] = GenerationConfig(
            eos_token_id=options["generation_config"], max_new_tokens=5
        )
    with predicting(word_llama, word_tokenizer, *script.split()) as produced:
        answers = generate_completions(
            word_llama, word_tokenizer, ["a", "b c"], max_new_tokens=5, **options
        )
    assert len(produced) == steps
    assert answers == [shown, shown]
    assert word_llama.generation_config.eos_token_id == ids(configured)


@pytest.mark.parametrize("completion", ["yes", "yes <eos>", "yes red", " yes red <eos>"])
def test_an_expected_completion_may_contain_its_end(word_llama, word_tokenizer, completion):
    """A chat template ends a completion with its end of turn, and perhaps the tokenizer's end."""
    word_llama.generation_config.eos_token_id = word_tokenizer.convert_tokens_to_ids("red")
    records = [{"prompt": "a", "completion": completion}, {"prompt": "a", "completion": "red"}]
    with predicting(word_llama, word_tokenizer, "yes", "red", "<eos>", "<eos>"):
        result = evaluate(word_llama, word_tokenizer, records, max_new_tokens=4)
    assert [prediction.correct for prediction in result.predictions] == [True, False]
    assert [prediction.completion for prediction in result.predictions] == [completion, "red"]


def test_a_trained_end_is_where_generation_stops(make_trainer, word_llama, word_tokenizer):
    """Generation stops at the collator's end token, even if the base has another."""
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.eos_token = "?"
    word_llama.generation_config.eos_token_id = word_tokenizer.eos_token_id
    config = ReftConfig(rank=4, positions="f2+l2", init="identity")
    trainer = make_trainer(config=config, max_steps=60)
    trainer.data_collator = ReftDataCollator(tokenizer)
    trainer.train()
    records = [dict(record) for record in trainer.train_dataset]
    prompts = [record["prompt"] for record in records]
    raw = generate_completions(
        trainer.model,
        tokenizer,
        prompts,
        max_new_tokens=3,
        eos_token_id=word_tokenizer.pad_token_id,
    )
    learnt = [
        text.split()[:1] == record["completion"].split()
        for text, record in zip(raw, records, strict=True)
    ]
    assert sum(learnt) >= 10
    result = evaluate(trainer.model, tokenizer, records, max_new_tokens=6)
    assert result.correct == sum(learnt)


def test_sampling_settings_of_the_model_do_not_make_it_sample(word_llama, word_tokenizer):
    greedy = generate_completions(word_llama, word_tokenizer, PROMPTS, max_new_tokens=6)
    word_llama.generation_config.update(do_sample=True, temperature=5.0, top_p=0.9, num_beams=3)
    assert generate_completions(word_llama, word_tokenizer, PROMPTS, max_new_tokens=6) == greedy
    torch.manual_seed(0)
    sampled = generate_completions(
        word_llama, word_tokenizer, PROMPTS, max_new_tokens=6, do_sample=True, temperature=5.0
    )
    assert sampled != greedy


def test_the_model_is_left_as_it_was(word_llama, word_tokenizer):
    word_llama.train()
    word_llama.model.layers[0].eval()
    before = [module.training for module in word_llama.modules()]
    seen = []
    handle = word_llama.lm_head.register_forward_hook(
        lambda module, arguments, output: seen.append((module.training, torch.is_grad_enabled()))
    )
    generate_completions(word_llama, word_tokenizer, ["a"], max_new_tokens=2)
    handle.remove()
    assert seen[0] == (False, False)
    assert [module.training for module in word_llama.modules()] == before


def test_generation_stops_at_the_models_last_position(word_llama, word_tokenizer):
    limit = context_length(word_llama)
    assert limit == 32
    prompt = " ".join(["a"] * (limit - 3))  # and <bos>: two positions are left
    answers = generate_completions(word_llama, word_tokenizer, [prompt], max_new_tokens=50)
    assert answers == [one_by_one(word_llama, word_tokenizer, prompt, 2)]


def test_bad_prompts_and_sizes_are_refused(word_llama, word_tokenizer):
    with pytest.raises(ValueError, match="prompt has 33 tokens and the model has 32 positions"):
        generate_completions(word_llama, word_tokenizer, ["a", "b " * 32])
    with pytest.raises(ValueError, match="prompt has 32 tokens and the model has 32 positions"):
        generate_completions(word_llama, word_tokenizer, ["b " * 31])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        generate_completions(word_llama, word_tokenizer, ["a"], batch_size=0)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got -1"):
        generate_completions(word_llama, word_tokenizer, ["a"], max_new_tokens=-1)
    with pytest.raises(ValueError, match="at least one record"):
        evaluate(word_llama, word_tokenizer, [])


def test_exact_match_and_predictions(word_llama, word_tokenizer, tmp_path):
    answers = generate_completions(word_llama, word_tokenizer, PROMPTS, max_new_tokens=4)
    records = [
        {"prompt": prompt, "completion": f" {answer}\n" if index != 1 else "wrong"}
        for index, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    ]
    stream = io.StringIO()
    result = evaluate(
        word_llama,
        word_tokenizer,
        records,
        batch_size=2,
        max_new_tokens=4,
        console=Console(file=stream, force_terminal=True),
    )
    assert (result.correct, result.score) == (4, 0.8)
    assert [prediction.correct for prediction in result.predictions] == [
        True,
        False,
        True,
        True,
        True,
    ]
    assert [prediction.prediction for prediction in result.predictions] == answers
    assert "5/5" in stream.getvalue()
    (tmp_path / "out.jsonl").write_text("replaced")
    result.write(tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {**record, "prediction": answer, "correct": index != 1}
        for index, (record, answer) in enumerate(zip(records, answers, strict=True))
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]
    other = Evaluation((*result.predictions[1:], result.predictions[0]))
    result.write(tmp_path / "out.jsonl", other)
    both = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert both == [
        {
            **json.loads(line),
            "base_prediction": answers[(index + 1) % 5],
            "base_correct": index != 0,
        }
        for index, line in enumerate(lines)
    ]


def test_another_scorer(word_llama, word_tokenizer):
    seen = []

    def scorer(generated, expected):
        seen.append((generated, expected))
        return expected == "right"

    records = [{"prompt": "a", "completion": "right"}, {"prompt": "b", "completion": "c"}]
    result = evaluate(word_llama, word_tokenizer, records, scorer=scorer, max_new_tokens=1)
    assert result.score == 0.5
    assert [expected for _, expected in seen] == ["right", "c"]


def test_scores_are_of_all_predictions():
    right, wrong = Prediction("p", "c", "c", True), Prediction("p", "c", "d", False)
    assert Evaluation((right, wrong, wrong, wrong)).score == 0.25
    assert exact_match(" a  b\n", "a b")
    assert not exact_match("a b", "ab")
    assert not exact_match("A", "a")
