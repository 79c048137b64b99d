"""Committed results: pages show the rows, and every row is valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.peers import peers
from benchmarks.report import pages
from benchmarks.report.device_report import render_report
from benchmarks.report.readme_table import readme_table
from benchmarks.report.serving_table import serving_section
from benchmarks.result_rows import RESULTS, read

ROOT = Path(__file__).resolve().parents[2]
#: Folders of devices; the folder "learning" has runs instead of rows.
FOLDERS = sorted(path for path in RESULTS.iterdir() if path.is_dir() and path.name != "learning")


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
def test_the_report_is_rendered_from_the_rows(folder):
    page = folder / "report" / "report.md"
    pictures = [
        line[2 : line.index("]")] for line in page.read_text().splitlines() if line.startswith("![")
    ]
    assert page.read_text() == render_report(read(folder), pictures)
    assert {path.name for path in page.parent.glob("*.png")} == set(pictures)


def test_the_readme_shows_the_rows_and_a_plot_of_them():
    text = pages.README.read_text()
    assert pages.section_of(text, pages.README_SECTION) == readme_table(read(RESULTS / "cpu"))
    assert "](benchmarks/results/cpu/report/step.png)" in text


def test_the_serving_page_shows_the_rows_and_a_plot_of_them():
    text = pages.SERVING.read_text()
    assert pages.section_of(text, pages.SERVING_SECTION) == serving_section(read(RESULTS / "cpu"))


@pytest.mark.parametrize("name", ["serving.png", "learning.png"])
def test_the_plots_of_docs_are_shown(name):
    assert any(f"]({name})" in page.read_text() for page in (ROOT / "docs").glob("*.md"))


def test_every_peer_has_a_committed_number():
    measured = {row.peer for row in read(RESULTS / "cpu") if row.value is not None}
    expected = {peer.name for peer in peers()} - {"ours (torch)"}  # on a CPU, "auto" is torch
    assert expected <= measured
