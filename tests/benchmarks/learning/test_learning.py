"""The command learn: stored runs, the choice of rates, trainable parameters, and the page."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, replace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.learning import tables
from benchmarks.learning.command import FOLDER
from benchmarks.learning.methods import METHODS, trainable_parameters
from benchmarks.learning.results import (
    best_rate,
    method_results,
    read_results,
    results_file,
    run_key,
    store_result,
)
from benchmarks.learning.run import make_plan, plan_as_json
from benchmarks.learning.tasks import TASKS
from benchmarks.report import pages
from benchmarks.report.plots.frame import save_figure
from benchmarks.report.plots.learning import learning_plot

TASK_NAMES = list(TASKS)


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["learn", *arguments])


@pytest.mark.parametrize(
    ("task", "methods", "seeds"),
    [("facts", ["loreft", "lora"], "0"), ("messages", ["loreft"], "0,1")],
)
def test_a_stored_run_is_not_repeated(task, methods, seeds, tmp_path):
    """A run is repeated only if its plan changed, and then gives the same numbers."""
    arguments = ("--tiny", "--task", task, "--methods", ",".join(methods), "--seeds", seeds)
    result = invoke(*arguments, "-o", str(tmp_path))
    assert result.exit_code == 0, result.output
    file = results_file(tmp_path, task)
    runs = read_results(file)
    assert len(runs) == 2
    assert runs == sorted(runs, key=lambda run: run_key(run["plan"]))
    assert runs[0]["plan"]["points"] == [2, 4]
    assert len(runs[0]["heldout"]) == len(runs[0]["development"]) == 2

    marked = [{**run, "seconds": -1.0} for run in runs]
    stale = {**marked[0], "plan": {**runs[0]["plan"], "data": "other"}}
    file.write_text("".join(json.dumps(run) + "\n" for run in (stale, *marked[1:])))
    assert invoke(*arguments, "-o", str(tmp_path)).exit_code == 0
    again = read_results(file)
    assert again[1:] == marked[1:]  # read, not trained
    assert again[0]["plan"] == runs[0]["plan"] and again[0]["seconds"] > 0
    for key in ("heldout", "development", "loss", "trained"):
        assert again[0][key] == runs[0][key]

    results = method_results(tmp_path, task)
    assert [each.method for each in results] == methods
    assert [len(each.runs) for each in results] == [len(seeds.split(","))] * len(methods)
    lines = tables.score_table(results).splitlines()
    assert len(lines) == 2 + len(methods) + 1  # a head, the methods, the base


@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_trainable_parameters(task, method):
    """Each method trains its own parameters; all of them train the head of a classifier."""
    base, _ = TASKS[task].load(0)
    total, width = base.num_parameters(), base.config.hidden_size
    blocks = base.config.num_hidden_layers
    head = sum(p.numel() for p in base.get_submodule(TASKS[task].head).parameters())
    model = METHODS[method].prepare(base, METHODS[method].setup(TASKS[task]))
    trainable = trainable_parameters(model)
    classifier = head if task == "messages" else 0
    rank, groups = TASKS[task].edit.rank, TASKS[task].edit.num_groups
    full_edit = blocks * groups * (2 * width * rank + rank) + classifier
    expected = {
        "full": total,
        "head": head,
        "lobireft": full_edit - blocks * groups * width * rank,
        "consreft": full_edit - blocks * groups * width * rank,
    }
    if method.startswith("lora"):
        assert classifier < trainable < total / 4
    else:
        assert trainable == expected.get(method, full_edit)


def test_the_parts_of_the_data_are_disjoint():
    for task in TASKS.values():
        training, development, heldout = (
            {json.dumps(record, sort_keys=True) for record in part} for part in task.split()
        )
        assert not training & development
        assert not training & heldout
        assert not development & heldout
    labels = [record["label"] for record in TASKS["messages"].split()[1]]
    assert set(labels) == set(range(6))


def test_the_rate_is_chosen_without_the_held_out_part():
    def result(development: list[float], heldout: float, loss: float):
        return {"development": development, "heldout": [0.0, heldout], "loss": [9.0, loss]}

    late, soon = [0.1, 0.9], [0.4, 0.9]
    assert best_rate({1e-3: result([0.5, 0.8], 1, 0.1), 1e-2: result(late, 0.1, 0.5)}) == 1e-2
    # Ties go to the rate that learnt sooner, whatever losses and held-out scores are.
    assert best_rate({1e-3: result(late, 1, 0.1), 1e-2: result(soon, 0.1, 0.5)}) == 1e-2
    assert best_rate({1e-3: result(soon, 0.1, 0.5), 1e-2: result(late, 1, 0.1)}) == 1e-3
    assert best_rate({1e-2: result(soon, 1, 0.1), 1e-3: result(soon, 0.1, 0.5)}) == 1e-3


def test_a_tied_head_gets_a_weight_of_its_own():
    base, _ = TASKS["facts"].load(0)
    embeddings = base.get_input_embeddings().weight
    assert base.lm_head.weight is embeddings
    model = METHODS["head"].prepare(base, METHODS["head"].setup(TASKS["facts"]))
    assert model.lm_head.weight is not embeddings
    assert torch.equal(model.lm_head.weight, embeddings)
    assert not embeddings.requires_grad


def test_the_page_shows_the_committed_results():
    text = pages.LEARNING.read_text(encoding="utf-8")
    tasks = tables.read_tasks(FOLDER)
    sections = tables.page_sections(tasks)
    names = {f"{table} of {task}" for table in ("scores", "rates") for task in TASKS}
    assert set(sections) == {*names, "family"}
    assert pages.fill_sections(text, sections) == text
    for results in tasks.values():
        assert [each.method for each in results] == list(METHODS)
        assert all(len(each.runs) == 3 for each in results)
        assert all(sorted(each.tried) == sorted(METHODS[each.method].rates) for each in results)
        loreft = next(each for each in results if each.method == "loreft")
        assert f"**{statistics.fmean(loreft.finals):.1f}**" in text


@pytest.mark.parametrize("task", TASK_NAMES)
def test_the_committed_runs_are_current_and_sorted(task):
    """Each run has the present plan, so it would not be repeated, and an unchanged checkout."""
    runs = read_results(results_file(FOLDER, task))
    keys = [run_key(run["plan"]) for run in runs]
    assert len(runs) == 75 and keys == sorted(set(keys))
    for run, (method, rate, seed) in zip(runs, keys, strict=True):
        current = make_plan(TASKS[task], method, rate, seed, None, None)
        assert plan_as_json(asdict(current)) == plan_as_json(run["plan"]), (method, rate, seed)
        assert len(run["heldout"]) == len(current.points)
        commit = run["machine"]["commit"]
        assert commit and not commit.endswith("+"), (method, rate, seed)


def test_plot_and_tables_of_a_few_runs(tmp_path):
    """AdapterCache show the stored scores, the best method first, and the plot depends on them."""
    plan = make_plan(TASKS["facts"], "loreft", 1e-2, 0, None, None)
    for method, rate, end in (("loreft", 1e-2, 0.5), ("loreft", 3e-2, 0.25), ("lobireft", 0.1, 1)):
        for seed in (0, 1) if rate != 3e-2 else (0,):
            run = replace(plan, method=method, rate=rate, seed=seed)
            curve = [end * point / run.steps for point in run.points]
            curve[-1] += 0.01 * seed
            machine = dict.fromkeys(("device", "torch", "transformers", "peft", "commit"), "x")
            result = {"format": 1, "plan": asdict(run), "development": curve, "heldout": curve}
            result |= {"counts": [7, 2, 3], "machine": machine, "trained": 25, "base": 1000}
            store_result(results_file(tmp_path, "facts"), result | {"before": 0.125})
    tasks = tables.read_tasks(tmp_path)
    results = tasks["facts"]
    rows = tables.score_table(results).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| LobiReFT", "| LoReFT", "| the base model, untrained"
    ]  # fmt: skip
    assert rows[1].endswith(" | **50.5** | 0.7 |")
    assert rows[1].startswith("| LoReFT | 25 | 2.50 | 0.01 | 3.1 |")
    assert rows[2].endswith(" | **12.5** | 0.0 |")
    assert "| **50.0 / 50.0** | 25.0 / 25.0 |" in tables.rate_table(results)
    family = tables.family_table(tasks)
    assert "| 31.3 (6) | 25.0 (1) | 100.5 (1) |\n" in family
    save_figure(learning_plot(tasks), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    first_runs = [replace(each, runs=each.runs[:1]) for each in results]
    save_figure(learning_plot({"facts": first_runs}), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_mistakes(tmp_path):
    for arguments in (("--methods", "lorra"), ("--task", "fact")):
        result = invoke(*arguments, "-o", str(tmp_path))
        assert result.exit_code != 0
        assert f"'{arguments[1]}'" in result.output
    before = sorted(FOLDER.rglob("*"))
    assert invoke("--tiny", "--methods", "head", "--task", "facts").exit_code == 2
    assert sorted(FOLDER.rglob("*")) == before
    with pytest.raises(FileNotFoundError, match="python -m benchmarks learn"):
        method_results(tmp_path, "facts")
    file = results_file(tmp_path, "facts")
    for line, reason in (("{nonsense", "line 1: "), ('{"format": 2}', "format must be 1, got 2")):
        file.write_text(f"{line}\n")
        with pytest.raises(ValueError, match=reason):
            method_results(tmp_path, "facts")
