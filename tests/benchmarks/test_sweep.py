"""The sweep in the interpreter: candidates are checked, timed beside the table, and written."""

from __future__ import annotations

import json
import time
from concurrent.futures import Executor
from dataclasses import asdict, replace

import pytest
import torch
from sample_rows import row
from typer.testing import CliRunner

from benchmarks import sweep
from benchmarks.__main__ import app
from benchmarks.peers import Operator
from benchmarks.report.device_report import render_report
from benchmarks.result_rows import Gate, read
from benchmarks.suites.op import Workload, tensors
from benchmarks.timing import Effort
from reft_kernels.devtools import tuning

CPU = torch.device("cpu")
(CASE,) = sweep.cases("ci")


class Here(Executor):
    """An executor in this thread; it records the sizes of its batches."""

    def __init__(self):
        self.batches = []

    def map(self, function, jobs):
        self.batches.append(len(jobs))
        return map(function, jobs)


def plan(**changes):
    """A plan that sweeps in this thread."""
    return replace(sweep.Plan(CPU, Here(), 2, Effort(0, 1, 1, warmup=0)), **changes)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_a_sweep_by_worker_processes(tmp_path):
    done = CliRunner().invoke(
        app,
        ["sweep", "--device", "cpu", "--size", "ci", "--most", "2", "--jobs", "1",
         "--output", str(tmp_path)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = read(tmp_path)
    assert [(each.metric, each.peer == "table") for each in rows] == [
        ("rows", True), ("rows", False), ("params", True), ("params", False),
    ]  # fmt: skip
    for each in rows:
        assert each.gate.passed and each.value > 0 and each.ratio > 0 and each.baseline == "table"
        settings = tuning.KernelConfig(**each.shape["settings"])
        assert each.peer in ("table", tuning.label(settings))
    for entry in json.loads((tmp_path / "settings.json").read_text()):
        assert entry["key"][0] == tuning.device_name(CPU)
        assert entry["ratio"] <= sweep.GAIN and entry["commit"]
    page = render_report(rows)
    assert "## Launch settings" in page and rows[1].peer in page


@pytest.mark.parametrize("broken", [{"rows": 3}, {"chunk": 48}])
def test_settings_that_do_not_compile_have_no_number(monkeypatch, broken):
    plain = tuning.candidates("rows", **sweep._shape(CASE, CPU))[0]
    tried = [plain, replace(plain, **broken)]
    monkeypatch.setattr(tuning, "candidates", lambda *args, **shape: tried)
    table, other = sweep.sweep_case(CASE, "rows", plan())
    assert table.value > 0 and table.ratio is not None
    assert other.value is None and "power of 2" in other.absent and not other.gate.passed
    assert sweep.winners(CASE, "rows", [table, other], CPU) == []


def test_settings_that_are_wrong_have_no_number(monkeypatch):
    """A padded rank below the rank leaves out part of the coefficients."""
    plain = tuning.candidates("rows", **sweep._shape(CASE, CPU))[0]
    tried = [plain, replace(plain, rank=2)]
    monkeypatch.setattr(tuning, "candidates", lambda *args, **shape: tried)
    _, other = sweep.sweep_case(CASE, "rows", plan())
    assert other.value is None and "against float64" in other.absent


def candidate(ratio, warps):
    plain = tuning.candidates("rows", **sweep._shape(CASE, CPU))[0]
    settings = replace(plain, warps=warps)
    shape = {"settings": asdict(settings)}
    return row(suite="sweep", peer=tuning.label(settings), ratio=ratio, shape=shape)


def test_the_fastest_candidate_wins_if_it_beats_the_noise():
    rows = [candidate(0.9, 1), candidate(0.6, 2), candidate(0.8, 8)]
    (entry,) = sweep.winners(CASE, "rows", rows, CPU)
    assert entry["settings"] == {"warps": 2} and entry["ratio"] == 0.6
    assert (entry["key"][0], entry["case"]) == ("cpu", str(CASE))
    assert sweep.winners(CASE, "rows", [candidate(0.98, 2), candidate(1.4, 8)], CPU) == []


def test_candidates_are_checked_in_batches_until_the_time_limit(monkeypatch):
    monkeypatch.setattr(sweep, "check_candidate", lambda job: Gate(True, ""))
    monkeypatch.setattr(sweep, "_timed", lambda *arguments: lambda: {"both": 1.0})
    pool = Here()
    rows = sweep.sweep_case(CASE, "rows", plan(pool=pool, most=3))
    assert next(rows).peer == "table" and pool.batches == [2]
    assert len(list(rows)) == 2 and pool.batches == [2, 1]
    over = plan(pool=Here(), until=time.perf_counter() - 1)
    assert list(sweep.sweep_case(CASE, "rows", over)) == [] and over.pool.batches == []


def test_the_table_is_written_after_every_candidate(tmp_path, monkeypatch):
    """A killed sweep leaves the winners that it has so far."""
    fast, slow = candidate(0.6, 2), candidate(0.7, 4)

    def killed(case, kernel, plan):
        yield slow
        yield fast
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "sweep_case", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep_settings("cpu", "ci", "", 0.0, 1, 0, tmp_path)
    (entry,) = json.loads((tmp_path / "settings.json").read_text())
    assert entry["ratio"] == 0.6 and entry["settings"] == {"warps": 2}
    assert [each.peer for each in read(tmp_path)] == [slow.peer, fast.peer]


def test_the_two_most_important_shapes_come_first():
    first, second = sweep.cases("gpu")[:2]
    assert (first.positions, first.rows, first.sequence) == ("f7+l7", 448, 16)
    assert (second.positions, second.rows) == ("all", 8192)
    for case in (first, second):
        assert (case.dim, case.rank, case.dtype) == (4096, 8, "bf16")


def test_feeding_is_subtracted():
    phases = {"both": [5.0, 7.0]}
    assert sweep._together(phases, 2.0) == [3.0, 5.0]
    assert sweep._together({"forward": [1.0], "backward": [2.0]}, 0.0) == [3.0]


def test_an_operator_that_does_nothing_leaves_only_feeding():
    edit = tensors(CASE, CPU)
    workload = Workload(Operator(lambda hidden: hidden, {}), edit.hidden, edit.upstream)
    workload.whole()
    out, grads = workload.result()
    assert torch.equal(out, edit.hidden) and torch.equal(grads["hidden"], edit.upstream)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "tpu"], "--device takes cpu or cuda, got 'tpu'"),
        (["--device", "cpu"], "without a GPU only --size ci can be swept"),
        (["--device", "cpu", "--size", "huge"], "--size takes ci, gpu, got 'huge'"),
        (["--device", "cpu", "--size", "ci", "--match", "r999"], "contains 'r999'"),
    ],
)
def test_bad_calls_give_a_single_line(arguments, says):
    done = CliRunner().invoke(app, ["sweep", *arguments])
    assert done.exit_code == 2 and says in done.stderr


def test_without_triton_on_the_device_nothing_is_swept(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    done = CliRunner().invoke(app, ["sweep", "--device", "cpu", "--size", "ci"])
    assert done.exit_code == 2 and "TRITON_INTERPRET=1" in done.stderr


def test_the_summary_of_a_kernel_is_a_single_line():
    assert sweep._summary([]) == "not reached"
    assert sweep._summary([row(ratio=None, absent="too much")]) == "none of 1 ran: too much"
    assert sweep._summary([candidate(0.9, 1), candidate(0.6, 2)]).startswith("2 of 2 ran; best ")
