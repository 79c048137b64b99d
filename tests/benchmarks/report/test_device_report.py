"""The report of a device, from handwritten rows."""

from __future__ import annotations

from sample_rows import MODEL, op_rows, page_tables, row, step, step_rows, sweep_rows

from benchmarks.report.device_report import render_report
from benchmarks.result_rows import Gate


def test_the_report_begins_with_the_machine():
    text = render_report(op_rows())
    assert text.startswith(
        "# Benchmark results\n\n"
        "Measured on Slow CPU, 1 thread of 2 cores, torch 2.13.0, triton 3.9.0, "
        "transformers 5.23.0, Python 3.11.7, Linux x86_64, commit 0123456789ab; "
        "pyreft 0.1.0; 2026-02-03.\n\n## The edit alone\n"
    )


def test_cases_of_the_edit_show_the_fields_that_differ():
    text = render_report(op_rows())
    assert page_tables(text) == [
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
    text = render_report(
        [row(), row(peer="adapters", value=None, absent="not installed", note="odd")]
    )
    assert [table[0] for table in page_tables(text)] == [["case", "ours"]]
    assert "\n– adapters: not installed\n" in text
    assert "odd" not in text


def test_a_failed_gate_is_not_a_number():
    bad = Gate(False, "out 3.0e-01; allowed 1e-04")
    rows = [
        row(),
        row(peer="pyreft", value=1e-3, gate=bad),
        row(peer="reference", gate=Gate(True, "")),
    ]
    text = render_report(rows)
    (table,) = page_tables(text)
    assert table[0] == ["case", "ours", "reference", "pyreft"]
    assert table[2] == ["a", "1.00 ms", "1.00 ms", "**failed**"]
    assert "\n**failed**: pyreft: out 3.0e-01; allowed 1e-04\n" in text
    assert "failed" not in render_report(rows[::2])


def test_notes_are_footnotes():
    again, untied = row(peer="pyreft", note="thrice"), row(peer="pyreft, untied", note="thrice")
    text = render_report([row(), again, untied, row(peer="adapters", note="in hooks")])
    assert page_tables(text)[0][0] == ["case", "ours", "pyreft ¹", "pyreft, untied ¹", "adapters ²"]
    assert "\n¹ thrice  \n² in hooks\n" in text


def test_steps_are_overheads_with_their_range():
    assert page_tables(render_report(step_rows())) == [
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
    text = render_report(sweep_rows())
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        "### Over rank",
        "### Over layers",
        "### Over length",
    ]
    rank, layers, length = page_tables(text)
    assert rank[0] == ["peer", "rank 1", "rank 8", "rank 32"]
    assert rank[-2:] == [
        ["ours", "+0.1 %", "+1.0 %", "+4.0 %"],
        ["pyreft", "+6.2 %", "+50 %", "+200 %"],
    ]
    assert layers[0] == ["peer", "edited layers 1", "edited layers 2"]
    assert length[0] == ["peer", "tokens 32", "tokens 64"]


def test_cases_with_equal_labels_keep_their_ids():
    first, second = step("ours", 1.1, case="first"), step("ours", 1.2, case="second")
    assert page_tables(render_report([first, second]))[0][0] == ["peer", "first", "second"]


def test_memory_and_generation_have_a_table_per_case():
    model = {"shape": MODEL, "baseline": "base"}
    rows = [
        row(suite="memory", metric="saved", unit="bytes", value=2e6, **model),
        row(suite="memory", metric="peak", unit="bytes", value=-512, **model),
        row(suite="generate", metric="decode", peer="base", value=2e-3, ratio=1.0, **model),
        row(suite="generate", metric="decode", value=2e-3, ratio=1.01, **model),
        row(suite="generate", metric="decode_operations", unit="count", value=0, **model),
    ]
    assert page_tables(render_report(rows)) == [
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
