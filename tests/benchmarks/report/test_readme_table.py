"""README's benchmark table, from handwritten rows."""

from __future__ import annotations

from sample_rows import op_rows, page_tables, step, step_rows, sweep_rows

from benchmarks.report.device_report import render_report
from benchmarks.report.readme_table import readme_table


def test_readme_table_is_the_whole_models_of_the_step_suite():
    text = readme_table([*op_rows(), *step_rows(), *sweep_rows()])
    assert page_tables(text) == [
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


def test_overheads_are_those_of_operators_where_there_are_some():
    whole = [step("frozen", 1.0), step("ours", 1.08), step("LoRA", None, absent="it fails")]
    better = [step(peer, ratio, metric="op_overhead") for peer, ratio in
              (("frozen", 1.0), ("ours", 1.004))]  # fmt: skip
    table = readme_table([*whole, *better])
    assert "+0.4 %" in table and "+8.0 %" not in table
    assert "Only operators and Python" in table and "it fails" in table
    page = render_report([*whole, *better])
    assert "### Whole step" in page and "### Operator overhead" in page
    assert "+8.0 %" in page and "+0.4 %" in page
    assert "+8.0 %" in readme_table(whole) and "Only operators" not in readme_table(whole)
