"""`reft report`: groups of runs, mean and deviation over seeds, published scores."""

from __future__ import annotations

import copy
import json
import statistics

import pytest

from reft.cli.app import main
from reft.paper import presets
from reft.paper.runs.collect import collect
from reft.paper.runs.report import markdown
from reft.paper.runs.result import RESULT_FILE, RUN_FILE, write_json

NAME = "arithmetic/llama-7b/loreft"


def result(seed: int, scores: dict[str, float], *changes: str, model: str | None = None) -> dict:
    """Make the result.json of a run by hand."""
    preset = presets.override(presets.load(NAME), list(changes))
    return {
        "format_version": 1,
        "preset": preset.to_dict(),
        "model": model or preset.hub_id,
        "seed": seed,
        "data": {"train": {"source": "here", "sha256": "ab", "records": 3}},
        "dtype": "bfloat16",
        "parameters": {"adapter": 2097408, "head": 0, "base": 6738415616, "percent": 0.03112613},
        "training": {
            "steps": 7,
            "seconds": 10.0 + seed,
            "tokens_per_second": 100.0,
            "memory": {"bytes": 3 * 2**30, "of": "tensors on the GPU"},
            "curve": [{"step": 1, "epoch": 0.1, "loss": 2.0}, {"step": 7, "epoch": 1, "loss": 1.0}],
        },
        "scores": {**scores, "average": statistics.fmean(scores.values())},
    }


def place(folder, *results: dict):
    for number, content in enumerate(results):
        run = folder / str(number) / f"seed-{content['seed']}"
        write_json(run / RUN_FILE, {"format_version": 1})
        write_json(run / RESULT_FILE, content)
    return folder


SCORES = [
    {"AQuA": 20.0, "gsm8k": 26.0, "mawps": 76.0, "SVAMP": 46.0},
    {"AQuA": 24.0, "gsm8k": 26.0, "mawps": 75.0, "SVAMP": 49.0},
    {"AQuA": 22.0, "gsm8k": 26.0, "mawps": 77.0, "SVAMP": 46.0},
]


@pytest.fixture
def three(tmp_path):
    return place(
        tmp_path, *(result(seed, scores) for seed, scores in zip((42, 43, 44), SCORES, strict=True))
    )


def test_seeds_become_mean_and_deviation(three):
    [group], unfinished = collect(three)
    assert (group.seeds, unfinished, group.caveats) == ((42, 43, 44), [], [])
    cells = {cell.name: cell for cell in group.cells}
    assert list(cells) == ["AQuA", "gsm8k", "mawps", "SVAMP", "average"]
    assert cells["AQuA"].mean == 22.0
    assert cells["AQuA"].sd == pytest.approx(2.0)  # of three values two apart, n − 1
    assert cells["gsm8k"].sd == 0.0
    assert (cells["AQuA"].published, cells["average"].published) == (21.4, 42.6)
    assert cells["AQuA"].difference == pytest.approx(0.6)


def test_one_run_has_no_deviation(tmp_path):
    [group], _ = collect(place(tmp_path, result(42, SCORES[0])))
    assert all(cell.sd is None for cell in group.cells)
    assert group.caveats == ["seeds not run: 43, 44"]


def test_what_differs_is_said(tmp_path):
    other = result(7, SCORES[0], "train.epochs=1", "rank=4", model="here/tiny")
    other["dtype"] = "float32"
    [group], _ = collect(place(tmp_path, other))
    said = "\n".join(group.caveats)
    for part in ("here/tiny", "LLaMA-7B", "train.epochs", "config.rank", "7", "float32"):
        assert part in said, part
    text = markdown([group], [], tmp_path)
    assert all(f"- {caveat}" in text for caveat in group.caveats)
    assert "reproduced" not in text


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (lambda stored: stored, 1),
        (lambda stored: stored["preset"]["config"].update(rank=4), 2),
        (lambda stored: stored.update(model="here/tiny"), 2),
        (lambda stored: stored["data"]["train"].update(sha256="cd"), 2),
        (lambda stored: stored["data"]["train"].update(source="there"), 1),
        (lambda stored: stored["preset"]["train"].update(seeds=[43]), 1),
    ],
)
def test_runs_of_one_kind_are_one_group(tmp_path, change, count):
    second = copy.deepcopy(result(43, SCORES[1]))
    change(second)
    groups, _ = collect(place(tmp_path, result(42, SCORES[0]), second))
    assert len(groups) == count


def test_a_set_that_a_judge_scores(tmp_path):
    stored = result(42, SCORES[0])
    stored["scores"] = {}
    [group], _ = collect(place(tmp_path, stored))
    assert group.cells == []
    text = markdown([group], [], tmp_path)
    assert "not scored" in text
    assert "need a judge" in text


def test_command(three, capsys):
    write_json(three / "9" / "seed-45" / RUN_FILE, {"format_version": 1})
    with pytest.raises(SystemExit) as left:
        main(["report", str(three)])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert (three / "report.md").read_text(encoding="utf-8") == out
    assert "| AQuA    | 22.0  | 2.0 | 21.4  | +0.6       |" in out
    assert "9/seed-45" in out
    [plot] = (three / "report").glob("*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"(report/{plot.name})" in out

    with pytest.raises(SystemExit):
        main(["report", str(three), "--json"])
    [group] = json.loads(capsys.readouterr().out)
    assert group["scores"]["AQuA"] == {"mean": 22.0, "sd": pytest.approx(2.0), "published": 21.4}
    assert group["published"]["average"] == 42.6


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda folder: folder / "nowhere", ["no such folder of runs", "nowhere"]),
        (lambda folder: folder, ["no run in", "reft train --preset"]),
        (
            lambda folder: place(folder, {**result(42, SCORES[0]), "format_version": 9}),
            ["must be 1, got 9; a newer version of reft"],
        ),
    ],
)
def test_mistakes(make, parts, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["report", str(make(tmp_path))])
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert error.count("\n") == 1
    assert all(part in error for part in parts), error
