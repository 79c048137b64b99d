"""`python -m benchmarks learn`: what is chosen, what is kept, and that the page says what the files
say."""

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
from benchmarks.learning.methods import METHODS, trained_parameters
from benchmarks.learning.run import best_rate, plan, run_once, stored
from benchmarks.learning.tasks import TASKS
from benchmarks.report import pages as report
from benchmarks.report.plots.learning import plot

TASK_NAMES = list(TASKS)


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["learn", *arguments])


@pytest.mark.parametrize("task", TASK_NAMES)
def test_a_short_run_is_kept_and_not_done_again(task, tmp_path):
    arguments = ("--tiny", "--task", task, "--methods", "loreft,lora", "--seeds", "0,1")
    result = invoke(*arguments, "-o", str(tmp_path))
    assert result.exit_code == 0, result.output
    files = sorted(tmp_path.glob(f"{task}/*.json"))
    assert len(files) == 4
    stored = json.loads(files[0].read_text(encoding="utf-8"))
    assert stored["plan"]["points"] == [2, 4]
    assert len(stored["heldout"]) == len(stored["development"]) == 2
    times = [path.stat().st_mtime_ns for path in files]
    marked = {**stored, "seconds": -1.0}
    files[0].write_text(json.dumps(marked), encoding="utf-8")
    assert invoke(*arguments, "-o", str(tmp_path)).exit_code == 0
    assert json.loads(files[0].read_text(encoding="utf-8")) == marked  # read, not made
    assert [path.stat().st_mtime_ns for path in files[1:]] == times[1:]
    stale = {**stored, "plan": {**stored["plan"], "data": "other"}}
    files[0].write_text(json.dumps(stale), encoding="utf-8")
    assert invoke(*arguments, "-o", str(tmp_path)).exit_code == 0
    again = json.loads(files[0].read_text(encoding="utf-8"))
    assert again["plan"] == stored["plan"]
    assert (again["heldout"], again["loss"]) == (stored["heldout"], stored["loss"])

    learnt = tables.read(tmp_path, task)
    assert [one.method for one in learnt] == ["loreft", "lora"]
    assert [len(one.runs) for one in learnt] == [2, 2]
    assert len(tables.scores(task, learnt)) == 2 + 2 + 1  # a head, two methods, the base


@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained(task, method):
    """Each method trains what it says; the head of a classifier goes with all of them."""
    base, _ = TASKS[task].load(0)
    total, width = base.num_parameters(), base.config.hidden_size
    blocks = base.config.num_hidden_layers
    head = sum(one.numel() for one in base.get_submodule(TASKS[task].head).parameters())
    trained = trained_parameters(METHODS[method].prepare(base, METHODS[method].setup(TASKS[task])))
    beside = head if task == "messages" else 0
    rank, groups = TASKS[task].edit.rank, TASKS[task].edit.num_groups
    full_edit = blocks * groups * (2 * width * rank + rank) + beside
    expected = {
        "full": total,
        "head": head,
        "lobireft": full_edit - blocks * groups * width * rank,
        "consreft": full_edit - blocks * groups * width * rank,
    }
    if method.startswith("lora"):
        assert beside < trained < total / 4
    else:
        assert trained == expected.get(method, full_edit)


def test_the_parts_of_the_data_do_not_meet():
    for task in TASKS.values():
        training, development, heldout = (
            {json.dumps(one, sort_keys=True) for one in part} for part in task.split()
        )
        assert not training & development
        assert not training & heldout
        assert not development & heldout
    labels = [one["label"] for one in TASKS["messages"].split()[1]]
    assert set(labels) == set(range(6))


def test_the_rate_is_chosen_without_the_held_out_part():
    def result(development: list[float], heldout: float, loss: float):
        return {"development": development, "heldout": [0.0, heldout], "loss": [9.0, loss]}

    late, soon = [0.1, 0.9], [0.4, 0.9]
    assert best_rate({1e-3: result([0.5, 0.8], 1, 0.1), 1e-2: result(late, 0.1, 0.5)}) == 1e-2
    # Of equals who learnt sooner, whatever the losses and the held-out scores are.
    assert best_rate({1e-3: result(late, 1, 0.1), 1e-2: result(soon, 0.1, 0.5)}) == 1e-2
    assert best_rate({1e-3: result(soon, 0.1, 0.5), 1e-2: result(late, 1, 0.1)}) == 1e-3
    assert best_rate({1e-2: result(soon, 1, 0.1), 1e-3: result(soon, 0.1, 0.5)}) == 1e-3


def test_a_run_is_the_same_twice(tmp_path):
    wanted = plan(TASKS["messages"], "loreft", 3e-3, 1, 3, 6)
    first, second = (run_once(wanted, tmp_path / name) for name in ("a", "b"))
    for key in ("heldout", "development", "loss", "trained"):
        assert first[key] == second[key]


def test_the_tied_head_gets_weights_of_its_own():
    base, _ = TASKS["facts"].load(0)
    embeddings = base.get_input_embeddings().weight
    assert base.lm_head.weight is embeddings
    model = METHODS["head"].prepare(base, METHODS["head"].setup(TASKS["facts"]))
    assert model.lm_head.weight is not embeddings
    assert torch.equal(model.lm_head.weight, embeddings)
    assert not embeddings.requires_grad


def test_the_page_says_what_the_files_say():
    text = report.PAGE.read_text(encoding="utf-8")
    lines = report.parts(FOLDER)
    shown = {f"{what} of {task}" for what in ("scores", "rates") for task in TASKS}
    assert set(lines) == {*shown, "family"}
    assert report.filled(text, lines) == text
    for task in TASKS:
        learnt = tables.read(FOLDER, task)
        assert [one.method for one in learnt] == list(METHODS)
        assert all(len(one.runs) == 3 for one in learnt)
        assert all(sorted(one.tried) == sorted(METHODS[one.method].rates) for one in learnt)
        loreft = next(one for one in learnt if one.method == "loreft")
        assert f"**{statistics.fmean(loreft.finals):.1f}**" in text


def test_the_committed_runs_are_of_these_plans():
    """A run that would be done again, or was made on a changed checkout, is no result."""
    files = sorted(FOLDER.glob("*/*.json"))
    assert files
    for path in files:
        result = json.loads(path.read_text(encoding="utf-8"))
        found = result["plan"]
        names = ("method", "rate", "seed")
        wanted = plan(TASKS[found["task"]], *(found[name] for name in names), None, None)
        assert stored(asdict(wanted)) == stored(found), path.name
        assert path == FOLDER / wanted.file
        assert len(result["heldout"]) == len(wanted.points)
        commit = result["machine"]["commit"]
        assert commit and not commit.endswith("+"), f"{path.name}: {commit}"


def test_the_plot_and_the_tables_of_a_few_runs(tmp_path):
    """What stands in the files comes out, the best first, and the page keeps what is around it."""
    shape = plan(TASKS["facts"], "loreft", 1e-2, 0, None, None)
    for method, rate, end in (("loreft", 1e-2, 0.5), ("loreft", 3e-2, 0.25), ("lobireft", 0.1, 1)):
        for seed in (0, 1) if rate != 3e-2 else (0,):
            one = replace(shape, method=method, rate=rate, seed=seed)
            curve = [end * point / one.steps for point in one.points]
            curve[-1] += 0.01 * seed
            machine = dict.fromkeys(("device", "torch", "transformers", "peft", "commit"), "x")
            result = {"format": 1, "plan": asdict(one), "development": curve, "heldout": curve}
            result |= {"counts": [7, 2, 3], "machine": machine, "trained": 25, "base": 1000}
            result["before"] = 0.125
            path = tmp_path / one.file
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(result), encoding="utf-8")
    learnt = tables.read(tmp_path, "facts")
    rows = tables.scores("facts", learnt)[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| LobiReFT", "| LoReFT", "| the base model, untrained"
    ]  # fmt: skip
    assert rows[1].endswith(" | **50.5** | 0.7 |")
    assert rows[1].startswith("| LoReFT | 25 | 2.50 | 0.01 | 3.1 |")
    assert rows[2].endswith(" | **12.5** | 0.0 |")
    assert "| **50.0 / 50.0** | 25.0 / 25.0 |" in tables.rates(learnt)[2]
    assert any(row.endswith("| 31.3 (6) | 25.0 (1) | 100.5 (1) |") for row in
               tables.family({"facts": learnt}))  # fmt: skip
    lines = report.parts(tmp_path)
    page = "above\n" + "".join(f"<!-- {m} -->\nold\n<!-- end of {m} -->\n" for m in lines) + "below"
    text = report.filled(page, lines)
    assert text.startswith("above\n") and text.endswith("below") and "old" not in text
    plot({"facts": learnt}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    learnt = [replace(one, runs=one.runs[:1]) for one in learnt]
    plot({"facts": learnt}, tmp_path / "b.png")
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
        tables.read(tmp_path, "facts")
    with pytest.raises(ValueError, match="once each"):
        report.filled("nothing here", {"family": []})
