"""``reft convert``: conversion without the base model, and one-line errors for mistakes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from foreign import cases, contents, golden, logits, roundings
from make_fixtures import FIXTURES, base_model

from reft import ReftConfig, ReftModel, get_reft_model, load_pyreft, save_pyreft
from reft.cli.app import main
from reft.io.adapter_files import read_adapter, write_adapter

PYREFT, ADAPTERS = cases("pyreft", "pyreft-old"), cases("adapters")


@pytest.fixture
def reft(capfd, tmp_path, monkeypatch):
    """Run the command line in an empty folder and return (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path):
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        return left.value.code, *capfd.readouterr()

    return run


@pytest.mark.parametrize("case", PYREFT)
def test_pyreft_to_reft(case, reft, tmp_path):
    library, made = PYREFT[case]
    options = ["--positions", made["positions"]]
    if made["activation"]:
        options += ["--activation", made["activation"]]
    if case == "noreft-trainer":
        options += ["--intervention", "noreft"]
    trainer = made["save"] == "trainer"
    source = FIXTURES / "pyreft" / case / ("checkpoint-4" if trainer else "")
    code, out, err = reft("convert", source, "made/out", *options)
    assert (code, err) == (0, "")
    assert re.fullmatch(
        rf"pyreft to reft: {made['intervention']}, {len(made['layers'])} layers, rank 3, width 16, "
        rf"positions {re.escape(made['positions'])}, {'tied' if made['tied'] else 'untied'}; "
        "written to made/out\n",
        out,
    )
    config, _ = read_adapter("made/out")
    assert list(config.layers) == sorted(made["layers"]) and config.dropout_on == "row"
    base = base_model("head" in made).to(getattr(torch, made["dtype"]))
    model = ReftModel.from_pretrained(base, "made/out")
    tensors, _ = golden(library)
    assert roundings(logits(model, tensors["input_ids"]), tensors[f"{case}/logits"]) <= 8


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_to_reft(case, reft):
    options = ["--intervention", case] if case in ("noreft", "direft") else []
    options += ["--head"] if "head" in ADAPTERS[case][1] else []
    code, out, err = reft("convert", FIXTURES / "adapters" / case, "out", *options)
    assert (code, err) == (0, "") and out.startswith("adapters to reft: ")
    model = ReftModel.from_pretrained(base_model("head" in ADAPTERS[case][1]), "out")
    tensors, _ = golden("adapters")
    assert roundings(logits(model, tensors["input_ids"]), tensors[f"{case}/logits"]) <= 16


@pytest.mark.parametrize("layers", ["all", [2, 0], [1]])
@pytest.mark.parametrize("training_state", [False, True])
def test_reft_to_pyreft_is_save_pyreft(layers, training_state, reft):
    config = ReftConfig(rank=2, tied=False, positions="f1+l2", layers=layers, activation="relu")
    model = get_reft_model(base_model(), config)
    model.save_pretrained("ours", training_state=training_state)
    code, out, err = reft("convert", "ours", "theirs", "--to", "pyreft")
    assert (code, err) == (0, "")
    assert "positions (f1+l2), activation (relu) and dropout (0): pass them to pyreft again" in out
    save_pyreft(model, "again")
    assert Path("theirs/config.json").read_text() == Path("again/config.json").read_text()
    written, expected = contents(Path("theirs")), contents(Path("again"))
    assert written.keys() == expected.keys()
    for file, stored in expected.items():
        assert all(torch.equal(stored[name], written[file][name]) for name in stored)


def test_a_head_goes_both_ways(reft):
    source = FIXTURES / "pyreft" / "loreft-classifier"
    assert reft("convert", source, "ours", "--positions", "f3+l2")[0] == 0
    assert reft("convert", "ours", "theirs", "--to", "pyreft")[0] == 0
    model = load_pyreft("theirs", base_model(head=True), positions="f3+l2")
    tensors, _ = golden("pyreft")
    expected = tensors["loreft-classifier/logits"]
    assert roundings(logits(model, tensors["input_ids"]), expected) <= 8
    assert reft("convert", source, "bare", "--positions", "f3+l2", "--no-head")[0] == 0
    assert read_adapter("bare")[0].modules_to_save is None


def test_every_option_arrives(reft):
    code, _, err = reft(
        *("convert", FIXTURES / "pyreft" / "loreft", "out", "--positions", "f2+l4"),
        *("--intervention", "loreft", "--activation", "gelu", "--dropout", "0.2"),
        *("--dropout-on", "delta", "--short-prompts", "paper", "--prompt-end", "second_to_last"),
        *("--block-path", "model.layers"),
    )
    assert (code, err) == (0, "")
    assert read_adapter("out")[0] == ReftConfig(
        rank=3,
        layers=[0, 1, 2],
        positions="f2+l4",
        activation="gelu",
        dropout=0.2,
        dropout_on="delta",
        short_prompts="paper",
        prompt_end="second_to_last",
        block_path="model.layers",
    )


def test_an_adapter_is_replaced_only_if_told(reft):
    command = ("convert", FIXTURES / "pyreft" / "loreft", "out", "--positions", "l1")
    assert reft(*command)[0] == 0
    before = Path("out/adapter_model.safetensors").read_bytes()
    command = ("convert", FIXTURES / "pyreft" / "direft", "out", "--positions", "l1")
    code, _, err = reft(*command)
    assert code == 2 and "--overwrite replaces it" in err
    assert Path("out/adapter_model.safetensors").read_bytes() == before
    assert reft(*command, "--overwrite")[0] == 0
    assert read_adapter("out")[0].intervention == "direft"


PY, AD = FIXTURES / "pyreft", FIXTURES / "adapters"
MISTAKES = {
    "no-positions": (("convert", PY / "loreft", "out"), "--positions must be given"),
    "bad-positions": (
        ("convert", PY / "loreft", "out", "--positions", "7"), "positions must be"
    ),
    "ambiguous": (
        ("convert", PY / "noreft-trainer" / "checkpoint-4", "out", "--positions", "l1"),
        'intervention must be given, "noreft" or "direft"',
    ),
    "direft-of-adapters": (("convert", AD / "direft", "out"), "does not store subtract_projection"),
    "no-folder": (("convert", "nowhere", "out"), "no such folder: nowhere"),
    "a-file": (("convert", "file", "out"), "this is a file, not an adapter folder"),
    "nothing-in-it": (("convert", "empty", "out"), "no adapter of reft"),
    "peft": (("convert", "lora", "out"), "a PEFT adapter changes weights"),
    "ours-to-ours": (("convert", "ours", "out"), "is already a folder of reft"),
    "theirs-to-theirs": (
        ("convert", PY / "loreft", "out", "--to", "pyreft"), "is already a folder of pyreft"
    ),
    "unknown-target": (
        ("convert", "ours", "out", "--to", "peft"), "--to must be one of reft, pyreft; got 'peft'"
    ),
    "said-already": (
        ("convert", "ours", "out", "--to", "pyreft", "--positions", "l1"),
        "--positions cannot be given for a folder of reft, got 'l1'",
    ),
    "head-of-ours": (
        ("convert", "ours", "out", "--to", "pyreft", "--no-head"), "--head cannot be given"
    ),
    "into-another-folder": (
        ("convert", AD / "loreft", "empty/.."), "must be a new, empty or adapter folder"
    ),
    "into-a-file": (("convert", AD / "loreft", "file"), "file is a file"),
    "pyreft-into-ours": (
        ("convert", AD / "loreft", "ours", "--to", "pyreft", "--overwrite"), "new or empty"
    ),
    "negative-layers": (("convert", "last", "out", "--to", "pyreft"), r"not be negative.*\[-1\]"),
    "a-component-pyreft-has-not": (
        ("convert", "inner", "out", "--to", "pyreft"), "component must be one that pyreft loads"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, reft, tmp_path):
    arguments, message = MISTAKES[name]
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    tensors = {"rotation": torch.eye(4)[None, None, :1], "bias": torch.zeros(1, 1, 1)}
    for folder, fields in {
        "ours": {},
        "last": {"layers": [-1]},
        "inner": {"component": "module:mlp.up_proj"},
    }.items():
        config = ReftConfig(intervention="consreft", rank=1, **{"layers": [0], **fields})
        write_adapter(tmp_path / folder, config, tensors)
    before = _files(tmp_path)
    code, out, err = reft(*arguments)
    assert (code, out) == (2, "")
    assert re.search(message, err) and err.startswith("Error: ") and err.count("\n") == 1, err
    assert _files(tmp_path) == before


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_source_is_never_the_target(reft, tmp_path):
    source = shutil.copytree(AD / "loreft", tmp_path / "source")
    before = _files(source)
    code, _, err = reft("convert", source, source, "--overwrite")
    assert code == 2 and "must be a new, empty or adapter folder" in err
    assert _files(source) == before
