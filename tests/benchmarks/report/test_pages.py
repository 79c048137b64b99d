"""The writer of page sections: it replaces the text between markers and nothing else."""

from __future__ import annotations

import pytest

from benchmarks.report.pages import fill_sections, section_of, write_sections

BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def test_only_the_text_between_the_markers_changes(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        assert write_sections(page, {"table": "| new |"}) == page
        assert page.read_text() == f"before\n{BEGIN}\n| new |\n{END}\nafter\n"
    assert section_of(page.read_text(), "table") == "| new |"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_several_sections_are_filled():
    text = "".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in "ab")
    filled = fill_sections(text, {"a": "first", "b": "second"})
    assert (section_of(filled, "a"), section_of(filled, "b")) == ("first", "second")


@pytest.mark.parametrize(
    "text",
    ["no markers", BEGIN, f"{END}\n{BEGIN}", 2 * f"{BEGIN}{END}"],
    ids=["none", "half", "reversed", "twice"],
)
def test_a_page_without_markers_is_left_alone(tmp_path, text):
    page = tmp_path / "README.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md: the page needs the lines <!-- table -->"):
        write_sections(page, {"table": "table"})
    assert page.read_text() == text
