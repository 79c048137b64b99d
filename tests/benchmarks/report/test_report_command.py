"""The command report: page and plots, README's table, and errors."""

from __future__ import annotations

import pytest
import typer
from sample_rows import op_rows, row, step_rows, sweep_rows, write
from typer.testing import CliRunner

from benchmarks.report import pages
from benchmarks.report.command import write_report
from benchmarks.report.device_report import render_report
from benchmarks.report.readme_table import readme_table

app = typer.Typer()
app.command()(write_report)


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_page_and_plots(tmp_path):
    write(tmp_path / "step.jsonl", *step_rows(), *sweep_rows())
    done = call(tmp_path)
    assert done.exit_code == 0, done.output
    assert done.output == f"{tmp_path / 'report' / 'report.md'}: 36 rows, 2 plots\n"
    text = (tmp_path / "report" / "report.md").read_text()
    assert text == render_report([*step_rows(), *sweep_rows()], ["step.png", "sweeps.png"])
    assert "![step.png](step.png)\n\n![sweeps.png](sweeps.png)" in text
    assert call(tmp_path / "step.jsonl", "--output", tmp_path / "there").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == [
        "report.md",
        "step.png",
        "sweeps.png",
    ]


def test_the_readme_option_writes_the_table_and_no_page(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    monkeypatch.setattr(pages, "README", page)
    results = write(tmp_path / "step.jsonl", *step_rows())
    page.write_text("<!-- benchmark table -->\n<!-- end of benchmark table -->\n")
    done = call(results, "--readme")
    assert done.exit_code == 0, done.output
    assert pages.section_of(page.read_text(), "benchmark table") == readme_table(step_rows())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "step.jsonl"]

    page.write_text("nothing")
    done = call(results, "--readme")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {page}: the page needs the lines")
    done = call(write(tmp_path / "op.jsonl", *op_rows()), "--readme")
    assert done.stderr == "error: README's table needs rows of the suite step, got none\n"


def test_results_that_cannot_be_reported_give_a_single_line(tmp_path):
    done = call(tmp_path)
    assert done.exit_code == 2
    assert done.stderr == f"error: no results at {tmp_path}: a .jsonl file or a folder with some\n"
    for device in ("a", "b"):
        (tmp_path / device).mkdir()
        write(tmp_path / device / "op.jsonl", row())
    done = call(tmp_path)
    assert done.stderr == (
        "error: two results for op / a / forward / ours: give the folder of one device\n"
    )
    assert not (tmp_path / "report").exists()


def test_tables_are_written_even_if_a_plot_fails(tmp_path, monkeypatch):
    def fails(rows, folder):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("benchmarks.report.plots.draw", fails)
    (tmp_path / "op.jsonl").write_text(row().as_json() + "\n")
    with pytest.raises(RuntimeError, match="no fonts"):
        write_report(tmp_path)
    assert (tmp_path / "report" / "report.md").read_text() == render_report([row()])
