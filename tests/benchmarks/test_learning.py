"""`python -m benchmarks learn`: what is chosen, what is kept, and that the page says what the files
say."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.learning import report, tables
from benchmarks.learning.command import FOLDER
from benchmarks.learning.methods import METHODS, trained_parameters
from benchmarks.learning.run import best_rate, plan, run_once
from benchmarks.learning.tasks import TASKS

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
    assert len(tables.scores(task, learnt)) == 4


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


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no committed results")
def test_the_page_says_what_the_files_say():
    text = report.PAGE.read_text(encoding="utf-8")
    lines = report.parts(FOLDER)
    assert set(lines) == {"scores of facts", "scores of messages", "family"}
    assert report.filled(text, lines) == text
    for task in TASKS:
        learnt = tables.read(FOLDER, task)
        assert [one.method for one in learnt] == list(METHODS)
        assert all(len(one.runs) == 3 for one in learnt)
        loreft = next(one for one in learnt if one.method == "loreft")
        assert f"**{statistics.fmean(loreft.finals):.1f}**" in text


def test_mistakes(tmp_path):
    result = invoke("--methods", "lorra", "-o", str(tmp_path))
    assert result.exit_code != 0
    assert "lorra" in result.output
    with pytest.raises(FileNotFoundError, match="python -m benchmarks learn"):
        tables.read(tmp_path, "facts")
    with pytest.raises(ValueError, match="once each"):
        report.filled("nothing here", {"family": []})
