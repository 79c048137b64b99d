"""Rules of the pages: links resolve, commands exist, the index is complete, sentences are short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from reft.demo.causal import load_records

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
PROSE = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", *GUIDES]
PAGES = [*PROSE, "reft_kernels/README.md", "benchmarks/README.md"]
INDEX = "docs/README.md"

#: Words in a sentence; a span of code counts as one word.
LONGEST_SENTENCE = 25

_CODE_BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_MEASURED_BLOCK = re.compile(r"^<!-- (?P<name>.+?) -->.*?^<!-- end of (?P=name) -->$", re.S | re.M)
_PATH = re.compile(r"`((?:benchmarks|docs|reft|reft_kernels|scripts|tests)/[\w./-]*\w)/?`")
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _without_code(page: str) -> str:
    return _CODE_BLOCK.sub("", _text(page))


def _anchors(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", _without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _sentences(page: str) -> list[str]:
    """The sentences of a page's prose: no code, tables, headings or measured blocks."""
    text = _MEASURED_BLOCK.sub("", _without_code(page))
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = _LINK.sub(r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"^(#.*|\|.*| {4,}\S.*)$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*([-*]|\d+\.) ", "\n", text, flags=re.MULTILINE)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [
        sentence.strip()
        for paragraph in paragraphs
        for sentence in re.split(r"(?<=[.?!])[*\")]*\s", paragraph)
        if sentence.strip()
    ]


def test_the_readme_has_one_example_of_about_twenty_lines() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", _text("README.md"), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 24


def test_the_readme_example_prints_the_answers_on_the_page(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", _text("README.md"), re.DOTALL)
    process = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert list(tmp_path.rglob("adapter_model.safetensors"))
    (output,) = re.findall(r"```text\n(.*?)```", _text("README.md"), re.DOTALL)
    adapter, base = output.splitlines()
    assert process.stdout.splitlines()[-2:] == [adapter, base]
    completions = {record["prompt"]: record["completion"] for record in load_records("heldout")}
    prompt, answer = re.fullmatch(r"adapter: <s>(.* Answer:)( .*)</s>", adapter).groups()
    assert answer == completions[prompt]
    assert base.removeprefix("base:").strip() != adapter.removeprefix("adapter:").strip()


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_resolve(page: str) -> None:
    for _, link in _LINK.findall(_without_code(page)):
        if link.startswith(("https:", "http:")):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent.joinpath(target).resolve() if target else ROOT / page
        assert path.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in _anchors(str(path.relative_to(ROOT))), f"{page} links to {link}"


def test_the_index_links_every_guide() -> None:
    linked = {link.partition("#")[0] for _, link in _LINK.findall(_text(INDEX))}
    assert {Path(page).name for page in GUIDES} - {"README.md"} <= linked
    assert INDEX in {link for _, link in _LINK.findall(_text("README.md"))}


@pytest.mark.parametrize("page", PROSE)
def test_sentences_are_short(page: str) -> None:
    lengths = {sentence: len(sentence.split()) for sentence in _sentences(page)}
    too_long = [f"{count}: {text}" for text, count in lengths.items() if count > LONGEST_SENTENCE]
    assert not too_long, "\n".join(too_long)


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    named = set(re.findall(_PATH, _text(page)))
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_and_subcommands_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", _text(page))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"
    commands = {path.stem for path in (ROOT / "reft" / "cli").glob("*.py")}
    for command in set(re.findall(r"^(?:\$ )?reft ([a-z]+)", _text(page), re.MULTILINE)):
        assert command in commands, f"{page}: reft {command}"


def test_pages_speak_of_the_project_alone() -> None:
    for page in PAGES:
        assert not re.search(r"\bissues? #?\d|/work/|/tmp/|/root/", _text(page)), page
