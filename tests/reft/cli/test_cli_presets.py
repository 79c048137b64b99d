"""``reft presets``: list, show and copy; a one-line error for every mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from reft.cli.app import main
from reft.paper import presets

RUN = "commonsense/llama-7b/direft"


@pytest.fixture
def reft(capfd, tmp_path, monkeypatch):
    """Run the command line in an empty folder and return (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)

    def run(*arguments: str):
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main(arguments)
        return left.value.code, *capfd.readouterr()

    return run


def listed(text: str) -> list[str]:
    """Return the names in a table of presets."""
    return [word for line in text.splitlines() for word in line.split()[:1] if "/" in word]


# ------------------------------------------------------------------ list


@pytest.mark.parametrize("command", [("presets",), ("presets", "list")])
def test_list(reft, command):
    code, out, err = reft(*command)
    assert (code, err) == (0, "")
    assert listed(out) == presets.names()
    assert all(len(line) <= 80 for line in out.splitlines())
    [row] = [line.split() for line in out.splitlines() if line.startswith(f"{RUN} ")]
    assert row == [RUN, "direft", "0.031", "79.0"]
    [row] = [line.split() for line in out.splitlines() if "direft-readme" in line]
    assert row == ["gsm8k/llama-7b/direft-readme", "direft"]  # nothing published, nothing shown


@pytest.mark.parametrize(
    ("options", "count", "words"),
    [
        (("--task", "glue"), 33, "glue/"),
        (("--task", "glue/cola"), 5, "cola"),
        (("--task", "gsm8k"), 1, "readme"),
        (("--model", "roberta-LARGE"), 16, "roberta-large"),
        (("--model", "llama-13b"), 11, "llama-13b"),
        (("--model", "Llama-2 7B"), 6, "llama-2-7b"),
        (("--task", "commonsense", "--model", "yahma"), 6, "commonsense/llama-"),
    ],
)
def test_list_of_some(reft, options, count, words):
    code, out, _ = reft("presets", "list", *options)
    names = listed(out)
    assert (code, len(names)) == (0, count)
    assert all(words in name for name in names)
    assert f"\n{count} preset" in out


def test_list_as_json(reft):
    code, out, _ = reft("presets", "list", "--json", "--task", "arithmetic")
    listed = json.loads(out)
    assert code == 0
    assert [preset["name"] for preset in listed] == [
        name for name in presets.names() if name.startswith("arithmetic/")
    ]
    fields = {"name", "task", "model", "method", "config", "train", "eval", "provenance"}
    for preset in listed:
        assert fields | {"published"} <= set(preset)
        assert presets.Preset.from_dict(preset) == presets.load(preset["name"])


def test_json_without_a_command(reft):
    assert reft("presets", "--json") == reft("presets", "list", "--json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--task", "gleu"), "no preset of a task 'gleu' (did you mean 'glue'"),
        (("--model", "gpt"), "no preset of a model 'gpt'; models are LLaMA-7B, LLaMA-13B"),
        (("--task", "glue", "--model", "llama"), "models are RoBERTa-base, RoBERTa-large"),
    ],
)
def test_nothing_to_list(reft, options, words):
    code, out, err = reft("presets", "list", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_the_list_is_whole_in_a_narrow_pipe_and_needs_no_torch(tmp_path):
    code = """
import sys
from reft.cli.app import main
try:
    main(["presets", "list"])
finally:
    found = [name for name in ("torch", "transformers", "datasets") if name in sys.modules]
    print(found, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "20"},
    )
    assert done.stderr.strip() == "[]"
    assert listed(done.stdout) == presets.names()
    assert "\x1b" not in done.stdout


# ------------------------------------------------------------------ show


@pytest.mark.parametrize("name", presets.names())
def test_show(reft, name):
    code, out, err = reft("presets", "show", name)
    preset = presets.load(name)
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line for line in out.splitlines() if line.split()}
    sources = dict(re.findall(r"^\[(\d+)\] (.*)$", out, re.MULTILINE))
    whole = preset.to_dict()
    for section in ("config", "train", "eval"):
        for field, value in whole[section].items():
            row = rows[f"{section}.{field}"]
            if value is None:
                assert row.split()[1:] == ["none"]
                continue
            origin = preset.known_from(f"{section}.{field}")
            [status, number] = re.findall(r"(\w+) \[(\d+)\]", row)[0]
            assert status == origin.status
            assert origin.source.startswith(sources[number])
    for score in preset.published.scores.values():
        assert str(score) in out
    command = f"reft train --preset {name} --output runs/{name.replace('/', '-')}"
    assert command in out
    assert all(len(line) <= 80 or line.startswith("Run it: ") for line in out.splitlines())


def test_show_what_was_published(reft):
    _, out, _ = reft("presets", "show", "arithmetic/llama-13b/direft")
    text = " ".join(out.split())
    assert (
        "Published (Table 2): AQuA 20.5, gsm8k 35.8, mawps 80.8, SVAMP 54.8, average 48.0 ± 1.23"
        in text
    )
    assert "Trained: 3,277,120 parameters, 0.025 % of the model" in text
    _, out, _ = reft("presets", "show", "glue/roberta-base/rte/loreft")
    assert "Published (Table 13): rte 79.0 ± 2.76\n" in out


def test_show_as_json(reft):
    code, out, _ = reft("presets", "show", RUN, "--json")
    assert code == 0
    assert json.loads(out) == presets.load(RUN).to_dict()


# ------------------------------------------------------------------ copy


def test_copy_edit_show(reft, tmp_path):
    code, out, _ = reft("presets", "copy", RUN, "deep/mine.toml")
    assert (code, out) == (0, f"{RUN} written to deep/mine.toml\n")
    file = tmp_path / "deep" / "mine.toml"
    assert presets.load(file) == presets.load(RUN)
    assert [path.name for path in file.parent.iterdir()] == ["mine.toml"]
    file.write_text(file.read_text().replace("\nrank = 8\n", "\nrank = 3\n"))
    code, out, _ = reft("presets", "show", "deep/mine.toml")
    assert code == 0
    assert re.search(r"config\.rank +3 +changed \[", out)
    assert "in mine.toml; it was 8" in out
    assert "reft train --preset deep/mine.toml --output" in out


def test_copy_keeps_what_is_there(reft, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("mine")
    code, _, err = reft("presets", "copy", RUN, "mine.toml")
    assert (code, file.read_text()) == (2, "mine")
    assert err == "Error: mine.toml exists already; --overwrite replaces it\n"
    code, _, _ = reft("presets", "copy", RUN, "mine.toml", "--overwrite")
    assert code == 0
    assert presets.load(file) == presets.load(RUN)


def test_a_copy_is_written_whole_or_not_at_all(reft, tmp_path, monkeypatch):
    file = tmp_path / "mine.toml"
    file.write_text("mine")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    code, _, err = reft("presets", "copy", RUN, "mine.toml", "--overwrite")
    assert (code, err) == (2, "Error: No space left on device\n")
    assert file.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "commonsense/llama-7b/lorft"), "did you mean 'commonsense/llama-7b/loreft'"),
        (("show", "absent.toml"), "no such preset file: absent.toml"),
        (("show", "broken.toml"), "broken.toml is not TOML"),
        (("show",), "Missing argument 'NAME'"),
        (("lst",), "No such command 'lst'"),
        (("--json", "show", RUN), "--json must follow the command"),
        (("copy", "glue/cola", "x.toml"), "no preset 'glue/cola'"),
        (("copy", RUN, "x.txt"), "the copy must be a file *.toml, got x.txt"),
        (("copy", RUN, "folder.toml"), "cannot write folder.toml: it is a folder"),
        (("copy", RUN, "broken.toml/x.toml"), "cannot write to"),
    ],
)
def test_one_line_for_a_mistake(reft, tmp_path, arguments, words):
    (tmp_path / "broken.toml").write_text("name = ")
    (tmp_path / "folder.toml").mkdir()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = reft("presets", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("Error: ")
    assert words in err
    assert sorted(tmp_path.rglob("*")) == before
