"""The examples of ``docs/from-pyreft.md`` run, and give the same answer."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
from make_fixtures import FIXTURES, base_model

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "from-pyreft.md").read_text()
THEIRS, OURS, BETWEEN, ADAPTERS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example in an empty folder and return its output."""
    monkeypatch.chdir(tmp_path)

    def execute(example: str, **names) -> str:
        capsys.readouterr()
        exec(compile(example, "from-pyreft.md", "exec"), {"__name__": "example", **names})
        return capsys.readouterr().out

    return execute


def _answer(output: str) -> str:
    [answer] = [line for line in output.splitlines() if line.startswith("<s>Question")]
    return answer


def test_ours_runs_and_is_the_shorter(run, tmp_path):
    assert "Question: " in run(OURS)
    assert (tmp_path / "ours" / "adapter_model.safetensors").is_file()
    lengths = [sum(bool(line.strip()) for line in source.splitlines()) for source in (OURS, THEIRS)]
    assert lengths[0] <= 20 < lengths[1]


@pytest.mark.peer
def test_theirs_runs_and_ours_answers_as_it_does(run, tmp_path):
    if importlib.util.find_spec("pyreft") is None:
        pytest.skip("not run: pyreft is not installed")
    theirs = _answer(run(THEIRS))
    assert _answer(run(BETWEEN)) == theirs
    checkpoint = BETWEEN.replace('"theirs"', '"run/checkpoint-20"').replace("again", "second")
    assert _answer(run(checkpoint)) == theirs
    assert {path.name for path in (tmp_path / "theirs").glob("intkey*")} == {
        path.name for path in (tmp_path / "again").glob("intkey*")
    }


def test_the_example_for_adapters(run, tmp_path):
    shutil.copytree(FIXTURES / "adapters" / "loreft", tmp_path / "folder")
    after = "print(model.configs['default'].positions)\n"
    assert run(ADAPTERS + after, base=base_model()) == "f3+l2\n"


def test_the_table_of_names_is_the_familys():
    from reft_kernels import FAMILY

    section = PAGE[PAGE.index("## Names of the family") : PAGE.index("## Convert from the command")]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    named = {
        ours: theirs
        for row in rows
        for ours, theirs in zip(
            re.findall(r"`(\w+)`", row[0]), re.findall(r"`(\w+)`", row[2]), strict=True
        )
    }
    assert named == {spec.name: spec.pyreft for spec in FAMILY.values()}
