"""The pages say what works: examples run, links lead somewhere, commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from reft.demo.causal import load_records

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "reft_kernels/README.md",
    "benchmarks/README.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]


def _text(page: str) -> str:
    return (ROOT / page).read_text()


def test_the_readme_has_one_example_of_about_twenty_lines() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", _text("README.md"), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 24


def test_the_readme_example_runs_and_answers_as_it_says(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", _text("README.md"), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("adapter_model.safetensors"))
    (said,) = re.findall(r"```text\n(.*?)```", _text("README.md"), re.DOTALL)
    adapter, base = said.splitlines()
    assert done.stdout.splitlines()[-2:] == [adapter, base]
    expected = {record["prompt"]: record["completion"] for record in load_records("heldout")}
    prompt, answer = re.fullmatch(r"adapter: <s>(.* Answer:)( .*)</s>", adapter).groups()
    assert answer == expected[prompt]
    assert base.removeprefix("base:").strip() != adapter.removeprefix("adapter:").strip()


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", _text(page)):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


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
