"""The section of docs/serving-cost.md and its plot, from handwritten rows."""

from __future__ import annotations

import dataclasses

import pytest
from sample_rows import MODEL, serve_rows

from benchmarks.report import pages
from benchmarks.report.plots.serve import serving_plot
from benchmarks.report.serving_table import serving_section


@pytest.fixture
def rows():
    """Rows of rank 2."""
    return serve_rows()


def test_the_page_is_filled(rows, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr(pages, "SERVING", page)
    page.write_text("above\n<!-- serving table -->\nold\n<!-- end of serving table -->\nbelow\n")
    pages.write_serving_page([*rows, *serve_rows(rank=16)])
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert "| ours | f3+l3 | 2 | 8 |" in text and "| LoRA | f3+l3 | 2 | 1 |" in text
    bytes_each = f"{MODEL['layers'] * (2 * MODEL['hidden'] + 1) * 2 * 4:,}"
    assert f"| f3+l3 | 2 | {bytes_each} | {bytes_each} | {bytes_each} |" in text
    assert "pyreft: one request at a time" in text and "vLLM has no line" in text
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")
    page.write_text("nothing")
    with pytest.raises(ValueError, match="needs the lines"):
        pages.write_serving_page(rows)
    with pytest.raises(ValueError, match="rows of the suite serve, got none"):
        serving_section([])


def test_a_line_of_the_table_is_read_from_its_rows(rows):
    """Each column is read from the row of its metric."""
    values = {
        "prefill": (0.5, 1.5), "decode": (0.05, 1.25), "prefill_over_one": (1.75, None),
        "decode_over_one": (1.875, None), "decode_operations": (3.0, None),
        "prefill_op_overhead": (0.25, 1.125),
        "decode_op_overhead": (0.03, 1.0625),
    }  # fmt: skip
    changed = [
        dataclasses.replace(row, value=values[row.metric][0], ratio=values[row.metric][1])
        for row in rows
        if row.peer == "ours" and row.shape["adapters"] == 8 and row.metric in values
    ]
    single = [
        dataclasses.replace(row, value=0.2)
        for row in rows
        if row.peer == "ours" and row.shape["adapters"] == 1 and row.metric == "prefill_op_overhead"
    ]
    base = [row for row in rows if row.peer == "base"]
    text = serving_section([*base, *single, *changed])
    line = "| ours | f3+l3 | 2 | 8 | 1.125 | 1.250 | 1.50 | 1.75 | 3 | 1.062 | 1.25 | 1.88 |"
    assert line in text


def test_the_page_gives_the_noise(rows):
    """The noise is the range of the ratios without adapters, if there are any."""
    again = [row for row in rows if row.peer == "ours" and row.shape["adapters"] == 0]
    kept = [row for row in rows if row not in again]
    changed = [
        dataclasses.replace(row, ratio={"prefill": 0.875, "decode": 1.25}[row.metric])
        for row in again
        if row.metric in ("prefill", "decode")
    ]
    assert "the noise: 0.88 to 1.25. " in serving_section([*kept, *changed])
    assert "noise" not in serving_section(kept)


def test_the_plot_tells_operators_from_times(rows):
    figure = serving_plot([row for row in rows if row.ratio is not None])
    assert any("ours: operators" in text.get_text() for text in figure.texts)
    timed = [row for row in rows if row.ratio is not None and "op_overhead" not in row.metric]
    figure = serving_plot(timed)
    assert any("ours: timed, LoRA: timed" in text.get_text() for text in figure.texts)
