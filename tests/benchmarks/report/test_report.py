"""The report of a device, README's table, and the command, from handwritten rows."""

from __future__ import annotations

import pytest
import typer
from sample_rows import MACHINE, MODEL, op_rows, row, step, step_rows, sweep_rows, write
from typer.testing import CliRunner

from benchmarks.report import pages
from benchmarks.report.command import write_report
from benchmarks.report.conditions import measured_on
from benchmarks.report.device_report import render_report as render
from benchmarks.report.readme_table import readme_table
from benchmarks.result_rows import Gate

app = typer.Typer()
app.command()(write_report)


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tables(text):
    """The tables of a page: a list of lines each, a list of cells per line."""
    parsed = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            parsed[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif parsed[-1]:
            parsed.append([])
    return [table for table in parsed if table]


def test_the_report_begins_with_the_machine():
    text = render(op_rows())
    assert text.startswith(
        "# Benchmark results\n\n"
        "Measured on Slow CPU, 1 thread of 2 cores, torch 2.13.0, triton 3.9.0, "
        "transformers 5.23.0, Python 3.11.7, Linux x86_64, commit 0123456789ab; "
        "pyreft 0.1.0; 2026-02-03.\n\n## The edit alone\n"
    )


def test_two_machines_have_a_sentence_each():
    later = MACHINE | {
        "commit": "ba9876543210+",
        "device": "Fast GPU",
        "driver": "580",
        "threads": 4,
    }
    text = render([row(), row(suite="load", metric="wrap", shape=MODEL, machine=later)])
    lines = [line for line in text.splitlines() if line.startswith("Measured")]
    assert lines[0].startswith("Measured (op) on Slow CPU, 1 thread of 2 cores, torch")
    assert lines[1].startswith("Measured (load) on Fast GPU, driver 580, 4 threads of 2 cores,")
    assert lines[1].endswith("commit ba9876543210 with uncommitted changes; 2026-02-03.")


def test_cases_of_the_edit_show_the_fields_that_differ():
    text = render(op_rows())
    assert tables(text) == [
        [
            ["D", "ours", "reference, compiled", "pyreft", "share of *ours*"],
            ["---", "---:", "---:", "---:", "---:"],
            ["64", "1.00 ms", "40.0 µs (0.0400×)", "3.00 ms (3.00×)", "25 %"],
            ["128", "2.00 ms", "–", "500 ms (250×)", "12.5 %"],
        ]
    ]
    assert "### Forward\n\nAll: positions all, rows 8, rank 4.\n" in text
    assert "\n– reference, compiled: no compiler (1 of 2)\n" in text


def test_a_peer_without_numbers_is_only_listed_below():
    text = render([row(), row(peer="adapters", value=None, absent="not installed", note="odd")])
    assert [table[0] for table in tables(text)] == [["case", "ours"]]
    assert "\n– adapters: not installed\n" in text
    assert "odd" not in text


def test_a_failed_gate_is_not_a_number():
    bad = Gate(False, "out 3.0e-01; allowed 1e-04")
    rows = [
        row(),
        row(peer="pyreft", value=1e-3, gate=bad),
        row(peer="reference", gate=Gate(True, "")),
    ]
    text = render(rows)
    (table,) = tables(text)
    assert table[0] == ["case", "ours", "reference", "pyreft"]
    assert table[2] == ["a", "1.00 ms", "1.00 ms", "**failed**"]
    assert "\n**failed**: pyreft: out 3.0e-01; allowed 1e-04\n" in text
    assert "failed" not in render(rows[::2])


def test_notes_are_footnotes():
    again, untied = row(peer="pyreft", note="thrice"), row(peer="pyreft, untied", note="thrice")
    text = render([row(), again, untied, row(peer="adapters", note="in hooks")])
    assert tables(text)[0][0] == ["case", "ours", "pyreft ¹", "pyreft, untied ¹", "adapters ²"]
    assert "\n¹ thrice  \n² in hooks\n" in text


def test_steps_are_overheads_with_their_range():
    assert tables(render(step_rows())) == [
        [
            ["peer", "Llama 64x2, 2×32 tokens", "Llama 128x2, 2×32 tokens"],
            ["---", "---:", "---:"],
            ["frozen", "200 ms", "40.0 ms"],
            ["frozen again ¹", "−0.2 % (−1.2 to +0.8)", "0.0 % (−1.0 to +1.0)"],
            ["ours", "+0.4 % (+0.2 to +0.6)", "+9.5 % (+8.5 to +10)"],
            ["pyreft", "+131 % (+130 to +132)", "–"],
        ]
    ]


def test_each_sweep_has_its_table():
    text = render(sweep_rows())
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        "### Over rank",
        "### Over layers",
        "### Over length",
    ]
    rank, layers, length = tables(text)
    assert rank[0] == ["peer", "rank 1", "rank 8", "rank 32"]
    assert rank[-2:] == [
        ["ours", "+0.1 %", "+1.0 %", "+4.0 %"],
        ["pyreft", "+6.2 %", "+50 %", "+200 %"],
    ]
    assert layers[0] == ["peer", "edited layers 1", "edited layers 2"]
    assert length[0] == ["peer", "tokens 32", "tokens 64"]


def test_cases_with_equal_labels_keep_their_ids():
    first, second = step("ours", 1.1, case="first"), step("ours", 1.2, case="second")
    assert tables(render([first, second]))[0][0] == ["peer", "first", "second"]


def test_memory_and_generation_have_a_table_per_case():
    model = {"shape": MODEL, "baseline": "base"}
    rows = [
        row(suite="memory", metric="saved", unit="bytes", value=2e6, **model),
        row(suite="memory", metric="peak", unit="bytes", value=-512, **model),
        row(suite="generate", metric="decode", peer="base", value=2e-3, ratio=1.0, **model),
        row(suite="generate", metric="decode", value=2e-3, ratio=1.01, **model),
        row(suite="generate", metric="decode_operations", unit="count", value=0, **model),
    ]
    assert tables(render(rows)) == [
        [
            ["peer", "peak", "saved for backward"],
            ["---", "---:", "---:"],
            ["ours", "−512 B", "2.00 MB"],
        ],
        [
            ["peer", "decoding step", "added operators per token"],
            ["---", "---:", "---:"],
            ["base", "2.00 ms", ""],
            ["ours", "+1.0 %", "0"],
        ],
    ]


def test_readme_table_is_the_whole_models_of_the_step_suite():
    text = readme_table([*op_rows(), *step_rows(), *sweep_rows()])
    assert tables(text) == [
        [
            ["peer", "Llama 64x2, 2×32 tokens", "Llama 128x2, 2×32 tokens"],
            ["---", "---:", "---:"],
            ["frozen", "200 ms", "40.0 ms"],
            ["frozen again ¹", "−0.2 %", "0.0 %"],
            ["ours", "+0.4 %", "+9.5 %"],
            ["pyreft", "+131 %", "–"],
        ]
    ]
    assert text.startswith("Measured on Slow CPU, 1 thread of 2 cores, torch 2.13.0,")
    assert "All: positions f7+l7, rank 4, dtype fp32." in text
    assert text.endswith("– pyreft: it fails here (1 of 2)  \n¹ the baseline again")


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


def test_the_command_writes_page_and_plots(tmp_path):
    write(tmp_path / "step.jsonl", *step_rows(), *sweep_rows())
    done = call(tmp_path)
    assert done.exit_code == 0, done.output
    assert done.output == f"{tmp_path / 'report' / 'report.md'}: 36 rows, 2 plots\n"
    text = (tmp_path / "report" / "report.md").read_text()
    assert text == render([*step_rows(), *sweep_rows()], ["step.png", "sweeps.png"])
    assert "![step.png](step.png)\n\n![sweeps.png](sweeps.png)" in text
    assert call(tmp_path / "step.jsonl", "--output", tmp_path / "there").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == [
        "report.md",
        "step.png",
        "sweeps.png",
    ]


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


def test_overheads_are_those_of_operators_where_there_are_some():
    whole = [step("frozen", 1.0), step("ours", 1.08), step("LoRA", None, absent="it fails")]
    better = [step(peer, ratio, metric="op_overhead") for peer, ratio in
              (("frozen", 1.0), ("ours", 1.004))]  # fmt: skip
    table = readme_table([*whole, *better])
    assert "+0.4 %" in table and "+8.0 %" not in table
    assert "Only operators and Python" in table and "it fails" in table
    page = render([*whole, *better])
    assert "### Whole step" in page and "### Operator overhead" in page
    assert "+8.0 %" in page and "+0.4 %" in page
    assert "+8.0 %" in readme_table(whole) and "Only operators" not in readme_table(whole)


def test_tables_are_written_even_if_a_plot_fails(tmp_path, monkeypatch):
    def fails(rows, folder):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("benchmarks.report.plots.draw", fails)
    (tmp_path / "op.jsonl").write_text(row().as_json() + "\n")
    with pytest.raises(RuntimeError, match="no fonts"):
        write_report(tmp_path)
    assert (tmp_path / "report" / "report.md").read_text() == render([row()])


def test_two_commits_on_a_machine_are_one_sentence():
    later = MACHINE | {"commit": "ba9876543210"}
    rows = [row(), row(suite="load", metric="wrap", shape=MODEL, machine=later)]
    (sentence,) = measured_on(rows)
    assert sentence.count("Slow CPU") == 1
    assert ", commits 0123456789ab (op) and ba9876543210 (load); 2026" in sentence
    steps = [row(), row(peer="pyreft", machine=later)]
    assert ", commits 0123456789ab and ba9876543210; 2026" in measured_on(steps)[0]
