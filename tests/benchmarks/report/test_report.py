"""The page and README's table, from rows made by hand."""

from __future__ import annotations

import pytest
import typer
from sample_rows import MACHINE, MODEL, op_rows, row, step, step_rows, sweep_rows, write
from typer.testing import CliRunner

from benchmarks.report import device_report as report
from benchmarks.report.device_report import readme_table, render, rewrite, write_report
from benchmarks.report.tables import percent, quantity, times
from benchmarks.result_rows import Gate

app = typer.Typer()
app.command()(write_report)


def call(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def tables(text):
    """The tables of a page: each a list of lines, each a list of cells."""
    found = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12.0, "s", "12.0 s"),
        (0.25, "s", "250 ms"),
        (9.996e-4, "s", "1.00 ms"),
        (1.234e-6, "s", "1.23 µs"),
        (-2e-3, "s", "−2.00 ms"),
        (0, "bytes", "0 B"),
        (999, "bytes", "999 B"),
        (2_500_000, "bytes", "2.50 MB"),
        (134e6, "bytes", "134 MB"),
        (-4096, "bytes", "−4.10 kB"),
        (3e9, "bytes", "3.00 GB"),
        (40, "count", "40"),
        (0.5, "", "0.500"),
    ],
)
def test_quantities(value, unit, text):
    assert quantity(value, unit) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(1.004, "+0.4 %"), (0.988, "−1.2 %"), (2.31, "+131 %"), (1.0004, "0.0 %"), (1.0999, "+10 %")],
)
def test_percent(ratio, text):
    assert percent(ratio) == text


def test_times():
    assert [times(one) for one in (0.5, 1.0, 12.34, 250)] == ["0.500×", "1.00×", "12.3×", "250×"]


# ------------------------------------------------------------------ the page


def test_the_page_says_first_what_it_was_measured_on():
    text = render(op_rows())
    assert text.startswith(
        "# Benchmark results\n\n"
        "Measured on Slow CPU, 1 thread of 2 cores, torch 2.13.0, triton 3.9.0, "
        "transformers 5.23.0, Python 3.11.7, Linux x86_64, commit 0123456789ab; "
        "pyreft 0.1.0; 2026-02-03.\n\n## The edit itself\n"
    )


def test_two_states_of_the_code_are_two_lines():
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


def test_cases_of_the_edit_are_told_apart_by_what_differs():
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


def test_a_peer_without_any_number_is_named_below_alone():
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


def test_cases_that_look_alike_keep_their_ids():
    one, other = step("ours", 1.1, case="first"), step("ours", 1.2, case="second")
    assert tables(render([one, other]))[0][0] == ["peer", "first", "second"]


def test_memory_and_generation_have_a_table_a_case():
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
            ["peer", "peak", "kept for backward"],
            ["---", "---:", "---:"],
            ["ours", "−512 B", "2.00 MB"],
        ],
        [
            ["peer", "a decoded token", "operators more a token"],
            ["---", "---:", "---:"],
            ["base", "2.00 ms", ""],
            ["ours", "+1.0 %", "0"],
        ],
    ]


# ------------------------------------------------------------------ README


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
    assert text.endswith("– pyreft: it fails here (1 of 2)  \n¹ the same floor once more")


def test_rewriting_changes_only_what_is_between_the_markers(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    rewrite(page, "| new |")
    rewrite(page, "| new |")
    assert page.read_text() == f"before\n{report.BEGIN}\n| new |\n{report.END}\nafter\n"


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        report.BEGIN,
        f"{report.END}\n{report.BEGIN}",
        2 * f"{report.BEGIN}{report.END}",
    ],
)
def test_a_page_without_markers_is_left_alone(tmp_path, text):
    page = tmp_path / "README.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="needs the lines <!-- benchmark table --> and"):
        rewrite(page, "table")
    assert page.read_text() == text


def test_the_readme_option_writes_the_table_and_no_page(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    results = write(tmp_path / "step.jsonl", *step_rows())
    page = tmp_path / "README.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    done = call(results, "--readme")
    assert done.exit_code == 0, done.output
    assert page.read_text() == f"{report.BEGIN}\n{readme_table(step_rows())}\n{report.END}\n"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["README.md", "step.jsonl"]

    page.write_text("nothing")
    done = call(results, "--readme")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {page} needs the lines")
    done = call(write(tmp_path / "op.jsonl", *op_rows()), "--readme")
    assert done.stderr == (
        "error: README's table is of the step suite, and there are no rows of it\n"
    )


# ------------------------------------------------------------------ the command


def test_the_command_writes_page_and_plots(tmp_path):
    write(tmp_path / "step.jsonl", *step_rows(), *sweep_rows())
    done = call(tmp_path)
    assert done.exit_code == 0, done.output
    assert done.output == f"{tmp_path / 'report' / 'report.md'}: 36 rows, 2 plots\n"
    text = (tmp_path / "report" / "report.md").read_text()
    assert text == render([*step_rows(), *sweep_rows()], ["step.png", "sweeps.png"])
    assert "![step.png](step.png)\n\n![sweeps.png](sweeps.png)" in text
    assert call(tmp_path / "step.jsonl", "--output", tmp_path / "there").exit_code == 0
    assert sorted(one.name for one in (tmp_path / "there").iterdir()) == [
        "report.md",
        "step.png",
        "sweeps.png",
    ]


def test_what_cannot_be_reported_is_one_line(tmp_path):
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


def test_overheads_are_read_from_counted_steps_where_there_are_some():
    whole = [step("frozen", 1.0), step("ours", 1.08), step("LoRA", None, absent="it fails")]
    better = [step(peer, ratio, metric="counted") for peer, ratio in
              (("frozen", 1.0), ("ours", 1.004))]  # fmt: skip
    table = readme_table([*whole, *better])
    assert "+0.4 %" in table and "+8.0 %" not in table
    assert "Counted: the operators" in table and "it fails" in table
    page = render([*whole, *better])
    assert "### Whole step" in page and "### Counted" in page
    assert "+8.0 %" in page and "+0.4 %" in page
    assert "+8.0 %" in readme_table(whole) and "Counted" not in readme_table(whole)


def test_tables_are_written_even_if_a_plot_fails(tmp_path, monkeypatch):
    def fails(rows, folder):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("benchmarks.report.plots.draw", fails)
    (tmp_path / "op.jsonl").write_text(row().as_json() + "\n")
    with pytest.raises(RuntimeError, match="no fonts"):
        write_report(tmp_path)
    assert (tmp_path / "report" / "report.md").read_text() == render([row()])
