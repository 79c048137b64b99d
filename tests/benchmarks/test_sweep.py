"""The sweep in the interpreter: candidates are checked, timed beside the table, written down."""

from __future__ import annotations

import json
from concurrent.futures import Executor
from dataclasses import replace

import pytest
import torch
from hand_made import row
from typer.testing import CliRunner

from benchmarks import sweep
from benchmarks.__main__ import app
from benchmarks.records import read
from benchmarks.report import render
from reft_kernels import tuning

CPU = torch.device("cpu")
(CASE,) = sweep.cases("ci")


class Here(Executor):
    """An executor that is this very thread."""

    def map(self, function, jobs):
        return map(function, jobs)


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
    assert [(one.metric, one.peer == "table") for one in rows] == [
        ("rows", True), ("rows", False), ("columns", True), ("columns", False),
    ]  # fmt: skip
    for one in rows:
        assert one.gate.passed and one.value > 0 and one.ratio > 0 and one.baseline == "table"
        settings = tuning.KernelConfig(**one.shape["settings"])
        assert one.peer in ("table", tuning.label(settings))
    for entry in json.loads((tmp_path / "settings.json").read_text()):
        assert entry["key"][0] == "cpu" and entry["ratio"] <= sweep.GAIN and entry["commit"]
    page = render(rows)
    assert "## Launch settings" in page and rows[1].peer in page


@pytest.mark.parametrize("broken", [{"rows": 3}, {"chunk": 48}])
def test_settings_that_do_not_compile_have_no_number(monkeypatch, broken):
    plain = tuning.candidates("rows", **sweep._shape(CASE, CPU))[0]
    tried = [plain, replace(plain, **broken)]
    monkeypatch.setattr(tuning, "candidates", lambda *args, **shape: tried)
    table, other = sweep.sweep_case(CASE, "rows", CPU, Here(), "ci")
    assert table.value > 0 and table.ratio is not None
    assert other.value is None and "power of 2" in other.absent and not other.gate.passed
    assert sweep.winners(CASE, "rows", [table, other], CPU) == []


def test_settings_that_are_wrong_have_no_number(monkeypatch):
    """A rank padded to less than it is leaves a part of the code out."""
    plain = tuning.candidates("rows", **sweep._shape(CASE, CPU))[0]
    tried = [plain, replace(plain, rank=2)]
    monkeypatch.setattr(tuning, "candidates", lambda *args, **shape: tried)
    _, other = sweep.sweep_case(CASE, "rows", CPU, Here(), "ci")
    assert other.value is None and "against float64" in other.absent


def candidate(ratio, warps):
    plain = tuning.candidates("rows", **sweep._shape(CASE, CPU))[0]
    settings = replace(plain, warps=warps)
    shape = {"settings": {name: getattr(settings, name) for name in settings.__slots__}}
    return row(suite="sweep", peer=tuning.label(settings), ratio=ratio, shape=shape)


def test_the_fastest_wins_if_it_is_faster_beyond_the_noise():
    rows = [candidate(0.9, 1), candidate(0.6, 2), candidate(0.8, 8)]
    (entry,) = sweep.winners(CASE, "rows", rows, CPU)
    assert entry["settings"] == {"warps": 2} and entry["ratio"] == 0.6
    assert (entry["device"], entry["case"]) == ("Slow CPU", str(CASE))
    assert sweep.winners(CASE, "rows", [candidate(0.98, 2), candidate(1.4, 8)], CPU) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "tpu"], "--device takes cpu or cuda, got 'tpu'"),
        (["--device", "cpu"], "without a GPU only --size ci can be swept"),
        (["--device", "cpu", "--size", "huge"], "--size takes ci, gpu, got 'huge'"),
        (["--device", "cpu", "--size", "ci", "--match", "r999"], "contains 'r999'"),
    ],
)
def test_bad_calls_are_one_line(arguments, says):
    done = CliRunner().invoke(app, ["sweep", *arguments])
    assert done.exit_code == 2 and says in done.stderr


def test_without_triton_on_the_device_nothing_is_swept(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    done = CliRunner().invoke(app, ["sweep", "--device", "cpu", "--size", "ci"])
    assert done.exit_code == 2 and "TRITON_INTERPRET=1" in done.stderr
