"""The committed results: what the pages show is what the rows say, and the rows can be believed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.peers import peers
from benchmarks.report.device_report import BEGIN, END, readme_table, render
from benchmarks.result_rows import RESULTS, read

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path for path in RESULTS.iterdir() if any(path.glob("*.jsonl")))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_number_passed_its_gate_and_names_its_commit(folder):
    rows = read(folder)
    assert rows
    for row in rows:
        assert row.value is None or row.gate is None or row.gate.passed, row.key
        assert (row.value is None) == (row.absent is not None), row.key
        commit = row.machine["commit"]
        assert commit and not commit.endswith("+"), f"{row.key} was measured on a changed checkout"
        assert row.machine["device"] and row.machine["torch"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_report_is_made_of_the_rows(folder):
    page = folder / "report" / "report.md"
    pictures = [
        line[2 : line.index("]")] for line in page.read_text().splitlines() if line.startswith("![")
    ]
    assert page.read_text() == render(read(folder), pictures)
    assert {path.name for path in page.parent.glob("*.png")} == set(pictures)


def test_the_readme_shows_the_rows_and_a_plot_of_them():
    text = (ROOT / "README.md").read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    assert text[begin:end].strip() == readme_table(read(RESULTS / "cpu")).strip()
    assert "](benchmarks/results/cpu/report/step.png)" in text


def test_every_peer_has_a_committed_number():
    measured = {row.peer for row in read(RESULTS / "cpu") if row.value is not None}
    expected = {peer.name for peer in peers()} - {"ours (torch)"}  # a CPU's "auto" is that
    assert expected <= measured
