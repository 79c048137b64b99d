"""Hostile folders of pyreft and adapters: pickles with code, odd tensors, path traversal."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from payloads import Harmful
from tiny_models import llama
from torch import nn
from witnesses import assert_same, files_of, nothing_happens, state_of

from reft import load_adapters_reft, load_pyreft
from reft.cli import app

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
NAN = float("nan")

PYREFT = {
    "file": lambda folder: next(folder.glob("intkey_layer_1_*#0.bin")),
    "config": lambda folder: folder / "config.json",
    "heads": lambda folder: folder / "pytorch_model.bin",
}


def base() -> nn.Module:
    return llama(hidden_size=16, intermediate_size=24)


def saved(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change the content of a tensor file."""

    def run(file: Path) -> None:
        tensors = torch.load(file, weights_only=True) if file.exists() else {}
        torch.save(change(tensors), file)

    return run


def described(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def run(file: Path) -> None:
        stored = json.loads(file.read_text())
        change(stored)
        file.write_text(json.dumps(stored))

    return run


def pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def row(at: int, value: object) -> Callable[[Path], None]:
    """Change an entry of the second representation."""
    return described(lambda c: c["representations"][1].__setitem__(at, value))


def repeated(tensors: dict) -> dict:
    """Make a tensor of 10^12 numbers in a few bytes."""
    return {**tensors, "weight": torch.zeros(1).expand(10**6, 10**6)}


DAMAGED = "config.json must be one that pyreft wrote"
PLAIN = "must be a plain tensor that the file holds whole"
#: Folder -> (file, change, text of the error)
REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "code": ("file", saved(lambda t: {**t, "weight": Harmful()}), "code, which is not run"),
    "code alone": ("file", saved(lambda t: Harmful()), "code, which is not run"),
    "code in a head": ("heads", saved(lambda t: {"a.b": Harmful()}), "code, which is not run"),
    "a pipe": ("file", pipe, "must be a plain file"),
    "a pipe as head": ("heads", pipe, "must be a plain file"),
    "a pipe as config": ("config", pipe, DAMAGED),
    "a tensor on no device": (
        "file", saved(lambda t: {**t, "weight": t["weight"].to("meta")}), PLAIN),
    "a tensor of 10^12": ("file", saved(repeated), PLAIN),
    "sparse": ("file", saved(lambda t: {**t, "bias": t["bias"].to_sparse()}), PLAIN),
    "integers": (
        "file", saved(lambda t: {**t, "weight": t["weight"].int()}), "weight as float32.*int32"),
    "complex": (
        "file", saved(lambda t: {**t, "rotate_layer": t["rotate_layer"] + 0j}), "complex64"),
    "float8": (
        "file", saved(lambda t: {**t, "bias": t["bias"].to(torch.float8_e5m2)}), "float8_e5m2"),
    "NaN": ("file", saved(lambda t: {**t, "weight": t["weight"] * NAN}), "weight must be finite"),
    "NaN in b": ("file", saved(lambda t: {**t, "bias": t["bias"] / 0}), "bias must be finite"),
    "NaN in a head": ("heads", saved(lambda t: {"lm_head.weight": torch.ones(40, 16) * NAN}),
                      "lm_head.weight must be finite"),
    "a long name": ("file", saved(lambda t: {**t, "w" * 10**5: t["bias"]}), "1000 characters"),
    "names that are numbers": ("file", saved(lambda t: {1: t["bias"]}), "by name, got dict"),
    "deep JSON": ("config", lambda f: f.write_text("[" * 10**5), DAMAGED),
    "not UTF-8": ("config", lambda f: f.write_bytes(b"\xff{}"), DAMAGED),
    "a list": ("config", lambda f: f.write_text("[]"), DAMAGED),
    "no files": ("config", described(lambda c: c.update(
        sorted_keys=[], representations=[], intervention_types=[])), DAMAGED),
    "a path outside": ("config", described(lambda c: c["sorted_keys"].__setitem__(
        1, "../../x#0")), r"missing: intkey_\.\./\.\./x#0\.bin"),
    "a key of a number": (
        "config", described(lambda c: c["sorted_keys"].__setitem__(1, 3)), DAMAGED),
    "a short row": (
        "config", described(lambda c: c["representations"].__setitem__(1, [])), DAMAGED),
    "a layer of text": ("config", row(0, "1"), DAMAGED),
    "a negative layer": ("config", row(0, -1), DAMAGED),
    "a layer that is true": ("config", row(0, True), DAMAGED),
    "a layer of 10^9": ("config", row(0, 10**9), "layers must lie in 0 … 2"),
    "a component of a list": ("config", row(1, ["block_output"]), DAMAGED),
    "a long component": ("config", row(1, "[" * 10**5), DAMAGED),
    "a path as component": ("config", row(1, "../../x[1]_output"), "layers must|same|edits"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_pyreft(name, marker, tmp_path):
    which, change, words = REFUSED[name]
    folder = shutil.copytree(FIXTURES / "pyreft" / "loreft", tmp_path / "a")
    change(PYREFT[which](folder))
    model = base()
    before = state_of(model)
    content = None if "pipe" in name else files_of(folder)
    with nothing_happens(), pytest.raises(ValueError) as caught:
        load_pyreft(folder, model, positions="f3+l2")
    assert re.search(words, str(caught.value)), str(caught.value)[:600]
    assert len(str(caught.value)) < 2000
    assert_same(before, state_of(model))
    assert content is None or files_of(folder) == content
    assert not marker.exists()
    if name not in ("a layer of 10^9", "a path as component"):  # which only a model tells
        out = tmp_path / "out"
        with nothing_happens(), pytest.raises(SystemExit) as left:
            app.main(["convert", str(folder), str(out), "--positions", "f3+l2"])
        assert left.value.code == 2 and not out.exists() and not marker.exists()


ADAPTERS = {
    "file": lambda folder: folder / "pytorch_adapter.bin",
    "config": lambda folder: folder / "adapter_config.json",
}


def inner(**changes) -> Callable[[Path], None]:
    return described(lambda c: c["config"].update(changes))


def first(change: Callable[[torch.Tensor], object]) -> Callable[[Path], None]:
    return saved(lambda t: {**t, next(iter(t)): change(next(iter(t.values())))})


ADAPTERS_REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "code": ("file", first(lambda tensor: Harmful()), "code, which is not run"),
    "a pipe": ("config", pipe, "not an adapters folder"),
    "deep JSON": ("config", lambda f: f.write_text('{"config":' * 10**5), "not an adapters"),
    "a tensor on no device": ("file", first(lambda tensor: tensor.to("meta")), PLAIN),
    "integers": ("file", first(lambda tensor: tensor.int()), "got torch.int32"),
    "NaN": ("file", saved(lambda t: {k: v * NAN if "bias" in k else v for k, v in t.items()}),
            "bias must be finite"),
    "positions of text": ("config", inner(prefix_positions="3+l1"), "at least 0, got '3.l1'"),
    "positions that are true": ("config", inner(prefix_positions=True), "at least 0, got True"),
    "a billion positions": ("config", inner(prefix_positions=10**9), "n from 1 to 999999"),
    "dropout NaN": ("config", inner(dropout=NAN), "dropout must be"),
    "architecture": ("config", inner(architecture=["x" * 10**6]), "must have the architecture"),
    "an activation of numbers": ("config", inner(non_linearity=3), "must have .* non_linearity"),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS_REFUSED)
def test_adapters(name, marker, tmp_path):
    which, change, words = ADAPTERS_REFUSED[name]
    case = next(folder for folder in sorted((FIXTURES / "adapters").iterdir()) if folder.is_dir())
    folder = shutil.copytree(case, tmp_path / "a")
    change(ADAPTERS[which](folder))
    model = base()
    before = state_of(model)
    with nothing_happens(), pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_adapters_reft(folder, model, intervention="direft" if "direft" in case.name else None)
    assert re.search(words, str(caught.value)), str(caught.value)[:600]
    assert len(str(caught.value)) < 2000
    assert_same(before, state_of(model))
    assert not marker.exists()


def test_the_marker_marks(marker, tmp_path):
    """The refused payload works if it is executed, and the audit hook sees it."""
    torch.save(Harmful(), tmp_path / "x.bin")
    with pytest.raises(AssertionError, match=r"unpickled|os\.mkdir"), nothing_happens():
        torch.load(tmp_path / "x.bin", weights_only=False)
    assert marker.exists()
