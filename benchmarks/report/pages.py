"""The writer of measured sections: README.md, docs/serving-cost.md and docs/learning.md.

A section lies between the lines ``<!-- NAME -->`` and ``<!-- end of NAME -->`` of its page. The
text around the sections is written by hand and kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report.plots.frame import save_figure
from benchmarks.report.plots.serve import serving_plot
from benchmarks.report.readme_table import readme_table
from benchmarks.report.serving_table import serving_section
from benchmarks.result_rows import Row, replace_file
from benchmarks.revision import ROOT

README = ROOT / "README.md"
SERVING = ROOT / "docs" / "serving-cost.md"
LEARNING = ROOT / "docs" / "learning.md"
#: Names of the sections of README.md and of docs/serving-cost.md.
README_SECTION, SERVING_SECTION = "benchmark table", "serving table"


def fill_sections(text: str, sections: Mapping[str, str]) -> str:
    """Replace the sections of a page.

    Args:
        text: the page.
        sections: maps the name of each section to its new text.

    Raises:
        ValueError: the page does not have the markers of a section once each and in order.
    """
    for name, section in sections.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if (text.count(begin), text.count(end)) != (1, 1) or text.index(begin) > text.index(end):
            raise ValueError(f"the page needs the lines {begin} and {end}, once each and in order")
        head, tail = text[: text.index(begin)], text[text.index(end) :]
        text = f"{head}{begin}\n{section}\n{tail}"
    return text


def section_of(text: str, name: str) -> str:
    """The text of a section of a page."""
    return text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- end of {name} -->")[0]


def write_sections(page: Path, sections: Mapping[str, str]) -> Path:
    """Replace the sections of a page file.

    Raises:
        ValueError: a section has no markers; the message names the file, which is left as it is.
    """
    try:
        text = fill_sections(page.read_text(encoding="utf-8"), sections)
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from None
    replace_file(page, text.encode())
    return page


def write_readme(rows: Sequence[Row]) -> Path:
    """Write README's benchmark table.

    Raises:
        ValueError: there are no rows of the suite "step", or the page has no section for them.
    """
    return write_sections(README, {README_SECTION: readme_table(rows)})


def write_serving_page(rows: Sequence[Row]) -> Path:
    """Write the table of docs/serving-cost.md and the plot beside it.

    Raises:
        ValueError: there are no rows of the suite "serve", or the page has no section for them.
    """
    write_sections(SERVING, {SERVING_SECTION: serving_section(rows)})
    plotted = [row for row in rows if row.suite == "serve" and row.ratio is not None]
    save_figure(serving_plot(plotted), SERVING.with_name("serving.png"))
    return SERVING


def write_learning_page(folder: Path) -> Path:
    """Write the tables of docs/learning.md and the plot beside it.

    Args:
        folder: of the results of ``python -m benchmarks learn``.

    Raises:
        ValueError: the page has no section for a table.
    """
    # Imported here, since they load transformers.
    from benchmarks.learning.tables import page_sections, read_tasks
    from benchmarks.report.plots.learning import learning_plot

    tasks = read_tasks(folder)
    write_sections(LEARNING, page_sections(tasks))
    save_figure(learning_plot(tasks), LEARNING.with_name("learning.png"))
    return LEARNING
