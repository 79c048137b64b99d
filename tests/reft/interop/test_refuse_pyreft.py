"""Folders of pyreft that cannot be loaded: a clear error, and an unchanged model."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign import cases, untouched
from make_fixtures import FIXTURES, base_model
from transformers import LlamaConfig, LlamaForCausalLM

from reft import load_pyreft

CASES = cases("pyreft")


def _file(folder: Path, layer: int, side: int = 0) -> Path:
    [file] = folder.glob(f"intkey_layer_{layer}_*#{side}.bin")
    return file


def _bare(folder: Path) -> None:
    (folder / "config.json").unlink()


def _change(layer: int, change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        file = _file(folder, layer)
        torch.save(change(torch.load(file, weights_only=True)), file)

    return run


def _config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        stored = json.loads((folder / "config.json").read_text())
        change(stored)
        (folder / "config.json").write_text(json.dumps(stored))

    return run


def _incomplete(folder: Path) -> None:
    _bare(folder)
    _file(folder, 1, 1).unlink()


def _third(folder: Path) -> None:
    _bare(folder)
    source = _file(folder, 1, 1)
    shutil.copy(source, source.with_name(source.name.replace("#1", "#2")))


def _renamed(old: str, new: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        _bare(folder)
        for file in list(folder.glob("intkey_*")):
            file.rename(file.with_name(file.name.replace(old, new)))

    return run


def _swapped_sides(stored: dict) -> None:
    for name in ("sorted_keys", "representations", "intervention_types"):
        stored[name] = [stored[name][i] for i in (0, 3, 1, 4, 2, 5)]


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "empty": ("loreft", lambda f: (shutil.rmtree(f), f.mkdir()), r"it has: nothing"),
    "no-intkey": (
        "loreft",
        lambda f: [file.unlink() for file in f.glob("intkey*")],
        r"no intkey_\*\.bin \(it has: config\.json",
    ),
    "missing": ("loreft", shutil.rmtree, "no such pyreft folder"),
    "a-file": ("loreft", lambda f: (shutil.rmtree(f), f.write_text("")), "this is a file"),
    "ranks": (
        "loreft",
        _change(1, lambda t: {"weight": t["weight"][:2], "bias": t["bias"][:2],
                              "rotate_layer": t["rotate_layer"][:, :2]}),
        r"same rank and width, got layers 0, 2: rank 3, width 16; layers 1: rank 2, width 16",
    ),
    "shapes": (
        "loreft",
        _change(1, lambda t: {**t, "bias": t["bias"][:2]}),
        r"layer_1_.* must hold R and W of \(r, D\).* \(3, 16\), \(3, 16\) and \(2,\)",
    ),
    "flat-R": (
        "loreft",
        _change(1, lambda t: {**t, "rotate_layer": t["rotate_layer"][None]}),
        r"must hold R and W of \(r, D\)",
    ),
    "incomplete-layer": (
        "loreft-untied", _incomplete, "layers 1 have one, layers 0, 2 have two"
    ),
    "three-on-a-layer": ("loreft-untied", _third, "layer 1 has #0, #1, #2"),
    "interventions": (
        "noreft",
        _config(lambda c: c["intervention_types"].__setitem__(
            0, "<class 'pyreft.interventions.NodireftIntervention'>")),
        "same intervention, got NodireftIntervention, NoreftIntervention",
    ),
    "mixed-tensors": (
        "loreft",
        lambda f: (_bare(f), shutil.copy(
            _file(FIXTURES / "pyreft" / "consreft", 1), _file(f, 1))),
        "same intervention, got layers 0, 2: loreft; layers 1: consreft or lobireft",
    ),
    "components": (
        "loreft",
        _config(lambda c: c["representations"][1].__setitem__(1, "mlp_output")),
        "at the same component, got layers 0, 2: block_output; layers 1: mlp_output",
    ),
    "unknown-component": (
        "loreft", _renamed("block_output", "mlp_activation"), "got 'mlp_activation'"
    ),
    "block-input": (
        "loreft-string", _renamed("_output", "_input"), "got 'model_layers.0._input'"
    ),
    "underscores-or-dots": (
        "loreft-string",
        _renamed("_output", "_self_attn_o_proj_output"),
        "without a config.json, its underscores",
    ),
    "heads-as-units": ("loreft", _renamed("unit_pos", "unit_h.pos"), r'tokens; got "h\.pos"'),
    "foreign-name": ("loreft", _renamed("nunit", "count"), "not a file name of pyreft"),
    "file-missing": ("loreft", lambda f: _file(f, 1).unlink(), "missing: intkey_layer_1"),
    "file-not-listed": (
        "loreft",
        lambda f: shutil.copy(_file(f, 1), f / _file(f, 1).name.replace("_1_", "_7_")),
        "not listed: intkey_layer_7",
    ),
    "broken-config": (
        "loreft",
        lambda f: (f / "config.json").write_text("{"),
        r"config\.json must be one that pyreft wrote",
    ),
    "another-config": (
        "loreft", lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
        r"config\.json must be one that pyreft wrote",
    ),
    "linked": (
        "loreft",
        _config(lambda c: c["representations"][1].__setitem__(9, "all")),
        "shares weights with other layers",
    ),
    "sides-in-turns": ("loreft-untied", _config(_swapped_sides), "every #0 before every #1"),
    "no-such-tensors": (
        "loreft", _change(1, lambda t: {"hello": t["bias"]}), "it holds hello"
    ),
    "not-tensors": ("loreft", _change(1, lambda t: {"weight": 3}), "tensors by name, got dict"),
    "truncated": (
        "loreft",
        lambda f: _file(f, 1).write_bytes(_file(f, 1).read_bytes()[:900]),
        "it is damaged or holds code",
    ),
    "empty-file": ("loreft", lambda f: _file(f, 1).write_bytes(b""), "it is damaged or holds code"),
    "decayed-R": (
        "loreft",
        _change(1, lambda t: {**t, "rotate_layer": 0 * t["rotate_layer"]}),
        "got 1 in layers 1; weight decay in the library",
    ),
    "nan-R": (
        "loreft",
        _change(1, lambda t: {**t, "rotate_layer": t["rotate_layer"] * float("nan")}),
        "orthonormal rows .* in layers 1",
    ),
    "small-base-of-R": (
        "consreft",
        _change(1, lambda t: {k: v[:5, :5] if k.endswith("0.base") else v for k, v in t.items()}),
        r"\(D, r\) and .* \(D, D\), got shapes \(16, 3\) and \(5, 5\)",
    ),
    "two-for-one-side": ("loreft-untied", lambda f: None, 'for each side; got "l2"'),
    "wrong-class": (
        "noreft",
        _config(lambda c: c.__setitem__("intervention_types",
            ["<class 'pyreft.interventions.LoreftIntervention'>"] * 6)),
        "must be noreft or direft, whose tensors are stored here",
    ),
    "a-head-the-model-lacks": (
        "loreft-classifier", lambda f: None, "modules_to_save must name modules .* got 'score'"
    ),
    "bare-parameter": (
        "loreft",
        lambda f: torch.save({"scale": torch.ones(1)}, f / "pytorch_model.bin"),
        "must belong to a module, got scale",
    ),
    "layer-beyond-the-model": ("loreft", _renamed("layer_2", "layer_9"), "got 9"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    case, break_it, message = REFUSED[name]
    folder = shutil.copytree(FIXTURES / "pyreft" / case, tmp_path / "broken")
    break_it(folder)
    base = base_model()
    before = untouched(base)
    positions = "l2" if name == "two-for-one-side" else CASES[case][1]["positions"]
    with pytest.raises((ValueError, OSError)) as caught:
        load_pyreft(folder, base, positions=positions)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert untouched(base) == before


def _load(case: str, **said):
    said = {"positions": "f3+l2", **said}
    return load_pyreft(FIXTURES / "pyreft" / case, base_model(), **said)


def test_another_width_is_refused():
    base = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=3,
                    intermediate_size=8, vocab_size=9, num_key_value_heads=2)
    )  # fmt: skip
    before = untouched(base)
    with pytest.raises(ValueError, match="the width 16 of the adapter, LlamaForCausalLM has 32"):
        load_pyreft(FIXTURES / "pyreft" / "loreft", base, positions="l1")
    assert untouched(base) == before


def test_a_projection_bias_outside_an_activation_is_refused():
    with pytest.raises(ValueError, match=r"activation must be None for intkey_layer_0.*'relu'"):
        _load("noreft-bias", activation="relu")
    _load("noreft-bias", activation="linear")
    _load("direft-bias", activation="relu")  # pyreft does not use this one


def test_bad_fields_are_refused_before_anything_is_read(tmp_path):
    for name, value in {"positions": "7", "activation": "rule", "dropout": 1.5}.items():
        said = {"positions": "l1", name: value}
        with pytest.raises(ValueError, match=f"ReftConfig.{name}"):
            load_pyreft(tmp_path / "nowhere", base_model(), **said)
    with pytest.raises(TypeError, match="positions"):
        load_pyreft(tmp_path, base_model())
    with pytest.raises(ValueError, match=r"must be 'loreft' or left out, .*got 'noreft'"):
        _load("loreft", intervention="noreft")


class _Harmful:
    def __reduce__(self):
        return os.mkdir, (os.environ["REFT_TEST_TRACE"],)


def test_a_pickle_with_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("REFT_TEST_TRACE", str(tmp_path / "ran"))
    for number, file in enumerate(("#0", "pytorch_model.bin")):
        folder = shutil.copytree(FIXTURES / "pyreft" / "loreft", tmp_path / f"{number}")
        target = _file(folder, 1) if file == "#0" else folder / file
        torch.save({"weight": _Harmful()}, target)
        base = base_model()
        before = untouched(base)
        with pytest.raises(ValueError, match="holds code, which is not run"):
            load_pyreft(folder, base, positions="f3+l2")
        assert untouched(base) == before
    assert not (tmp_path / "ran").exists()
