"""lm-evaluation-harness with a wrapped model: its class ``hf`` for the positions that it supports,
``reft`` for all."""

from __future__ import annotations

import functools
import json
import runpy
import sys

import pytest
import torch
from tiny_models import perturb

from reft import ReftConfig, ReftModel, get_reft_model

pytest.importorskip("lm_eval")

import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM

from reft.evaluation.lm_eval import ReftLM

#: Contexts and continuations of many lengths. The first four are one sequence, split differently.
PAIRS = [
    ("a : one b : two c :", " three green"),
    ("a : one b : two c : three", " green"),
    ("a : one b : two", " c : three green"),
    ("a : one b", " : two c : three green"),
    ("a : one b : two c : three", " blue"),
    ("a : one b : two c : three", " red"),
    ("d e f g h", " a b c d e f"),
    ("h : five", " yes"),
    ("", " a : one green"),
]
#: HFLM 0.4.13 shares logits between requests that split the same tokens differently, and then reads
#: them at the wrong positions.
UNSHARED = {"logits_cache": False}

CONFIGS = {
    "ends": ReftConfig(rank=4, positions="f2+l3"),
    "untied": ReftConfig(rank=4, positions="f1+l1", tied=False),
    "last": ReftConfig(rank=4, positions="l1"),
    "prompt": ReftConfig(rank=4, positions="prompt"),
    "paper": ReftConfig(rank=4, positions="f3+l3", short_prompts="paper"),
}


def instances(kind: str, arguments) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=request, idx=index)
        for index, request in enumerate(arguments)
    ]


def loglikelihood(lm: HFLM, pairs) -> list[tuple[float, bool]]:
    return lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)


def tokens_of(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    whole = tokenizer.encode(context + continuation)
    cut = len(tokenizer.encode(context))  # an empty context is <bos>
    return whole[:cut], whole[cut:]


def by_hand(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One sequence, no padding: log p of each token of the continuation after those before it."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        logits = model(input_ids=ids, prompt_lengths=[len(context)]).logits[0]
    start, total, greedy = len(context), 0.0, True
    for index, token in enumerate(continuation, start):
        scores = logits[index - 1].double()
        total += float(scores[token] - scores.logsumexp(0))
        greedy &= int(scores.argmax()) == token
    return total, greedy


def close(scores, expected) -> bool:
    return all(
        abs(score - want) < 1e-4 and same == want_same
        for (score, same), (want, want_same) in zip(scores, expected, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [*((name, 3) for name in CONFIGS), ("ends", 1), ("ends", 64), ("ends", "auto")],
)
def test_scores_are_those_of_the_context_as_prompt(word_llama, word_tokenizer, name, batch_size):
    model = perturb(get_reft_model(word_llama, CONFIGS[name]))
    lm = ReftLM(model, tokenizer=word_tokenizer, batch_size=batch_size, max_batch_size=4)
    wanted = [by_hand(model, *tokens_of(word_tokenizer, *pair)) for pair in PAIRS]
    assert close(loglikelihood(lm, PAIRS), wanted)
    with model.disable_adapter():
        plain = [by_hand(model, *tokens_of(word_tokenizer, *pair)) for pair in PAIRS]
    assert not close(wanted, plain)


def test_plain_hf_edits_the_end_of_the_continuation(word_llama, word_tokenizer):
    """It edits the first tokens of prompts at least twice as long, and other last tokens."""
    long = [pair for pair in PAIRS if len(pair[0].split()) >= 4]
    for positions, agree in (("f2", True), ("l2", False), ("f2+l2", False)):
        model = perturb(get_reft_model(word_llama, ReftConfig(rank=4, positions=positions)))
        scores = [
            loglikelihood(kind(model, tokenizer=word_tokenizer, batch_size=4, **UNSHARED), long)
            for kind in (HFLM, ReftLM)
        ]
        assert close(*scores) == agree, positions
        model.unload()


def test_the_base_is_the_adapter_disabled(word_llama, word_tokenizer):
    settings = {"tokenizer": word_tokenizer, "batch_size": 4, **UNSHARED}
    before = loglikelihood(HFLM(word_llama, **settings), PAIRS)
    model = perturb(get_reft_model(word_llama, CONFIGS["ends"]))
    with model.disable_adapter():
        scores = loglikelihood(ReftLM(model, **settings), PAIRS)
        hf = loglikelihood(HFLM(model, **settings), PAIRS)
    assert hf == before
    assert close(scores, before)


def test_a_context_too_long_is_cut_from_the_left(word_llama, word_tokenizer, caplog):
    model = perturb(get_reft_model(word_llama, CONFIGS["ends"]))
    lm = ReftLM(model, tokenizer=word_tokenizer, batch_size=2, max_length=8)
    scores = loglikelihood(lm, PAIRS[:2])
    expected = []
    for pair in PAIRS[:2]:
        context, continuation = tokens_of(word_tokenizer, *pair)
        expected.append(by_hand(model, context[len(continuation) - 9 :], continuation))
    assert close(scores, expected)
    assert "the context is cut from the left" in caplog.text


def test_a_request_that_cannot_be_scored(word_llama, word_tokenizer):
    lm = ReftLM(get_reft_model(word_llama, CONFIGS["ends"]), tokenizer=word_tokenizer, max_length=4)
    for context, continuation in (([1], []), ([], [5]), ([1], [5] * 5)):
        with pytest.raises(ValueError, match=r"1 … 4 tokens to score; got \d and \d tokens"):
            lm._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True)


@pytest.mark.parametrize("name", ["ends", "prompt", "paper"])
def test_rolling_has_the_prefix_token_as_prompt(word_llama, word_tokenizer, name):
    model = perturb(get_reft_model(word_llama, CONFIGS[name]))
    lm = ReftLM(model, tokenizer=word_tokenizer, batch_size=2, max_length=6)
    texts = ["a : one b : two c : three green", "d : five", "e f g h a b"]
    scores = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in texts]))
    bos = word_tokenizer.bos_token_id
    for text, score in zip(texts, scores, strict=True):
        ids, total = [bos, *lm.tok_encode(text)], 0.0
        first = ids[1:7]
        total += by_hand(model, [bos], first)[0]
        rest = ids[7:]
        if rest:  # the last window is full, and only its new tokens are scored
            window = ids[-7:]
            total += by_hand(model, window[: 7 - len(rest)], rest)[0]
        assert score == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("kind", [HFLM, ReftLM])
def test_generation_is_the_model_s(word_llama, word_tokenizer, kind):
    model = perturb(get_reft_model(word_llama, CONFIGS["ends"]))
    lm = kind(model, tokenizer=word_tokenizer, batch_size=3)
    contexts = ["a : one", "b : two c : three", "h", "d e f g : five"]
    settings = {"until": ["green"], "max_gen_toks": 4}
    texts = lm.generate_until(
        instances("generate_until", [(context, settings) for context in contexts])
    )
    for context, text in zip(contexts, texts, strict=True):
        ids = word_tokenizer(context, return_tensors="pt")["input_ids"]
        row = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert text == word_tokenizer.decode(row, skip_special_tokens=True).split("green")[0]


# ------------------------------------------------------------------------ folders, command line


@pytest.fixture
def folders(word_llama, word_tokenizer, tmp_path):
    """A folder with a base model, an adapter and a task, as for the command line."""
    for name in ("base", "task"):
        (tmp_path / name).mkdir()
    word_llama.save_pretrained(tmp_path / "base")
    word_tokenizer.save_pretrained(tmp_path / "base")
    model = perturb(get_reft_model(word_llama, CONFIGS["ends"]))
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    documents = [
        {"question": f"{letter} : {number}", "choices": ["red", "green", "blue"], "answer": k % 3}
        for k, (letter, number) in enumerate([("a", "one"), ("b c d", "two"), ("e", "three")])
    ]
    (tmp_path / "task" / "test.json").write_text("\n".join(map(json.dumps, documents)))
    task = {
        "task": "colors",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "task" / "test.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "task" / "colors.yaml").write_text(json.dumps(task))
    return tmp_path


def accuracy(model, tokenizer, folder) -> float:
    lines = (folder / "task" / "test.json").read_text().splitlines()
    right = 0
    for document in map(json.loads, lines):
        scores = [
            by_hand(model, *tokens_of(tokenizer, document["question"], f" {choice}"))[0]
            for choice in document["choices"]
        ]
        right += scores.index(max(scores)) == document["answer"]
    return right / len(lines)


def test_the_command_line_knows_the_model(folders, word_llama, word_tokenizer, monkeypatch):
    """``python -m reft.evaluation`` in this process, which does not know the model yet."""
    monkeypatch.delitem(model_registry._objs, "reft")
    monkeypatch.delitem(sys.modules, "reft.evaluation.lm_eval")
    command = [
        "lm_eval", "run", "--model", "reft", "--tasks", "colors", "--model_args",
        f"pretrained={folders / 'base'},reft={folders / 'adapter'},dtype=float32",
        "--include_path", str(folders / "task"), "--batch_size", "2", "--device", "cpu",
        "--output_path", str(folders / "out"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # runs pip
    without_defaults = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", without_defaults)  # indexes 10 000 files
    with pytest.raises(SystemExit) as left:
        runpy.run_module("reft.evaluation", run_name="__main__")
    assert not left.value.code
    (path,) = (folders / "out").rglob("results*.json")
    done = json.loads(path.read_text())
    model = ReftModel.from_pretrained(word_llama, folders / "adapter")
    score = accuracy(model, word_tokenizer, folders)
    assert done["results"]["colors"]["acc,none"] == pytest.approx(score)
    assert done["config"]["reft_config"]["positions"] == "f2+l3"
    assert done["config"]["reft"] == str(folders / "adapter")


def test_a_model_and_a_folder(folders, word_llama, word_tokenizer):
    with pytest.raises(ValueError, match="reft must name the adapter of a base model"):
        ReftLM(word_llama, tokenizer=word_tokenizer)
    lm = ReftLM(word_llama, reft=folders / "adapter", tokenizer=word_tokenizer)
    expected = [by_hand(lm.model, *tokens_of(word_tokenizer, *pair)) for pair in PAIRS]
    assert close(loglikelihood(lm, PAIRS), expected)
    with pytest.raises(ValueError, match="None for a ReftModel"):
        ReftLM(lm.model, reft=folders / "adapter")
