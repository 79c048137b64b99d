"""The demo of a language model: shipped files, parts, and a short run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from reft.demo import causal
from reft.demo.measure import StepTimes, compare_steps, frozen_step, training_step
from reft.demo.plot import loss_curve
from reft.demo.reload import answers_of_fresh_process
from reft.demo.report import DemoReport, Goals, GoalsMissed, Sample, count_same
from reft.model.reft_model import ReftModel, get_reft_model
from reft.train.collate import ReftDataCollator
from reft.train.evaluate import exact_match

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def known():
    """Return every subject of the facts table."""
    spec = importlib.util.spec_from_file_location("demo_facts", SCRIPTS / "demo_facts.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module.subjects()
    finally:
        del sys.modules[spec.name]


@pytest.fixture(scope="module")
def base():
    """Load the shipped model and its tokenizer; tests must not change them."""
    return causal.load_base()


# ---------------------------------------------------------------- shipped files


def test_assets_are_small():
    files = [file for file in causal.ASSETS.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".jsonl", ".safetensors"}
    assert sum(file.stat().st_size for file in files) < 6e6


def test_tokenizer_gives_every_text_back(base):
    _, tokenizer = base
    records = causal.load_records("train") + causal.load_records("heldout")
    texts = [record[field] for record in records for field in ("prompt", "completion")]
    for text in [*texts, "Zürich, naïve ☃ — “quoted”\n\tand  spaced"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_base_knows_the_answers_and_gives_them_in_the_wrong_way(base):
    model, tokenizer = base
    records = causal.load_records("heldout", 96)
    answers = causal.answers_of(model, tokenizer, records)
    right = [exact_match(a, r["completion"]) for a, r in zip(answers, records, strict=True)]
    within = [r["completion"].strip() in a for a, r in zip(answers, records, strict=True)]
    assert sum(right) <= 0.2 * len(records)
    assert sum(within) >= 0.95 * len(records)


def test_records_are_the_facts_and_no_heldout_subject_is_trained_on(known):
    by_name = {subject.name: subject for subject in known}
    longest_first = sorted(by_name, key=len, reverse=True)  # "Papua New Guinea" before "Guinea"
    names = re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})\b")
    about = {"train": set(), "heldout": set()}
    for file, subjects in about.items():
        for record in causal.load_records(file):
            (name,) = names.findall(record["prompt"])
            assert record["completion"].removeprefix(" ") in by_name[name].facts.values()
            subjects.add(name)
    assert not about["train"] & about["heldout"]
    assert about["train"] | about["heldout"] == set(by_name)
    kinds = {by_name[name].kind for name in about["heldout"]}
    assert kinds == {"country", "element", "animal"}


def test_facts_table(known):
    facts = {subject.name: subject.facts for subject in known}
    assert facts["Japan"] == {"capital": "Tokyo", "region": "Asia", "currency": "yen"}
    assert "region" not in facts["Turkey"]
    assert facts["gold"] == {"symbol": "Au", "number": "79"}
    assert facts["plutonium"] == {"symbol": "Pu", "number": "94"}
    assert facts["whale"] == {"class": "mammal"}


def test_limited_records_are_spread_over_the_file():
    everything = causal.load_records("heldout")
    few = causal.load_records("heldout", 3)
    third = len(everything) / 3
    assert few == [everything[int(k * third)] for k in range(3)]
    assert causal.load_records("heldout", 10**6) == everything


# ---------------------------------------------------------------- parts


def test_steps_are_timed_in_turns(monkeypatch):
    clock = [0.0]
    calls = []

    def costs(name, milliseconds):
        def call():
            calls.append(name)
            clock[0] += 1e-3 * milliseconds * len(calls)

        return call

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    times = compare_steps(costs("step", 3), costs("floor", 2), CPU, rounds=3, warmup=1)
    # Call n costs n units. Order after warm-up: baseline, step | step, baseline | baseline, step.
    assert calls == ["step", "floor", "floor", "step", "step", "floor", "floor", "step"]
    assert times.step_ms == pytest.approx(15)
    assert times.floor_ms == pytest.approx(12)
    assert times.ratio == pytest.approx(3 * 8 / (2 * 7))
    with pytest.raises(ValueError, match="rounds"):
        compare_steps(costs("step", 3), costs("floor", 2), CPU, rounds=0)


def test_floor_goes_back_to_the_block_and_no_further(word_llama, word_tokenizer):
    batch = ReftDataCollator(word_tokenizer)([{"prompt": "a : one", "completion": "green"}])
    reached = {}

    def watch(number):
        def forward_hook(module, args, output):
            reached[number] = output.requires_grad

        return forward_hook

    for number, block in enumerate(word_llama.model.layers):
        block.mlp.register_forward_hook(watch(number))
    frozen_step(word_llama, word_llama.model.layers[0], batch)()
    assert reached == {0: False, 1: True}  # what backward runs through
    assert all(parameter.grad is None for parameter in word_llama.parameters())
    assert not word_llama.model.layers[0]._forward_hooks


def test_training_step_changes_the_adapter_alone(word_llama, word_tokenizer):
    batch = ReftDataCollator(word_tokenizer)([{"prompt": "a : one", "completion": "green"}])
    model = get_reft_model(word_llama, causal.CONFIG)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    training_step(model, batch, lr=1e-2)()
    changed = {
        n for n, parameter in model.named_parameters() if not torch.equal(parameter, before[n])
    }
    assert changed == {n for n, parameter in model.named_parameters() if parameter.requires_grad}


def test_loss_curve_is_a_picture_of_the_points(tmp_path):
    path = tmp_path / "loss.png"
    loss_curve(path, [1, 2, 3], [3.0, 1.0, 0.1], title="three")
    flat = tmp_path / "flat.png"
    loss_curve(flat, [1, 2, 3], [1.0, 1.0, 1.0], title="three")
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert path.read_bytes() != flat.read_bytes()
    with pytest.raises(ValueError, match="got 2 and 1"):
        loss_curve(path, [1, 2], [1.0], title="uneven")


def test_failure_of_the_fresh_process_is_told(tmp_path):
    with pytest.raises(RuntimeError, match=r"exit code 1(.|\n)*no_such_module"):
        answers_of_fresh_process("no_such_module", tmp_path)


def _report(**changes):
    times = StepTimes(step_ms=3.0, floor_ms=2.0, ratio=1.5, rounds=20)
    report = DemoReport(
        title="A demo",
        metric="exact match",
        before=0.2,
        after=0.9,
        heldout=10,
        examples=20,
        steps=30,
        seed=0,
        train_seconds=4.0,
        trained=5,
        total=1000,
        times=times,
        orthonormality_error=1e-7,
        adapter="adapter",
        adapter_bytes=1500,
        reloaded_same=10,
        reloaded=10,
        loss_curve="loss.png",
        seconds=6.0,
        samples=(Sample("[b]Which?[/b]", " this", " that one", " this"),),
    )
    return dataclasses.replace(report, **changes)


def test_report_shows_and_writes_its_figures(tmp_path):
    console = Console(record=True, width=140, file=(tmp_path / "out").open("w"))
    report = _report()
    report.show(console)
    shown = console.export_text()
    for text in ("[b]Which?[/b]", "20.0%", "90.0%", "5 of 1,000 (0.50%)", "1.50 times", "1.0e-07"):
        assert text in shown
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(report)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"before": 0.21}, "before training is 21.0%"),
        ({"after": 0.89}, "after training is 89.0%"),
        ({"reloaded_same": 9}, "1 of 10 answers changed"),
    ],
)
def test_missed_goals_are_an_error(changes, told):
    _report().require(Goals())
    with pytest.raises(GoalsMissed, match=told):
        _report(**changes).require(Goals())


def test_answers_are_compared_one_by_one():
    assert count_same(["a", "b", "c"], ["a", "c", "b"]) == 1
    with pytest.raises(ValueError, match="2 and 1"):
        count_same(["a", "b"], ["a"])


# ---------------------------------------------------------------- a short run


@pytest.mark.slow
def test_short_demo(tmp_path):
    with (tmp_path / "printed").open("w") as printed:
        report = causal.run(
            tmp_path / "demo",
            epochs=3,
            examples=320,
            heldout=48,
            goals=Goals(before=0.2, after=0.5),
            console=Console(file=printed, width=120),
        )
    folder = tmp_path / "demo"
    assert (report.examples, report.heldout, report.steps) == (320, 48, 30)
    assert report.reloaded_same == report.reloaded == 48
    assert report.orthonormality_error < 1e-5
    assert "of 48 held-out examples" in (tmp_path / "printed").read_text()
    assert json.loads((folder / "report.json").read_text())["after"] == report.after
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")

    model, tokenizer = causal.load_base()
    size, rank = model.config.hidden_size, causal.CONFIG.rank
    assert report.trained == model.config.num_hidden_layers * (2 * rank * size + rank)
    assert report.total - report.trained == model.num_parameters()
    records = causal.load_records("heldout", 48)
    answers = causal.answers_of(
        ReftModel.from_pretrained(model, folder / "adapter"), tokenizer, records
    )
    right = sum(exact_match(a, r["completion"]) for a, r in zip(answers, records, strict=True))
    assert right == round(report.after * 48)
