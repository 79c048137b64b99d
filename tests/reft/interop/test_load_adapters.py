"""Loading folders of adapters: equal logits, or a clear error."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from foreign import cases, golden, logits, roundings, untouched
from make_fixtures import FIXTURES, RANK, base_model
from safetensors.torch import load_file, save_file

from reft import ReftModel, load_adapters_reft

CASES = cases("adapters")
FOLDERS = FIXTURES / "adapters"


def loaded(case: str, folder: Path | None = None, **said) -> ReftModel:
    """Load a case with the settings that a user would pass."""
    made = CASES[case][1]
    if case in ("noreft", "direft"):
        said.setdefault("intervention", case)
    said.setdefault("head", "head" in made)
    return load_adapters_reft(folder or FOLDERS / case, base_model("head" in made), **said)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_adapters(case):
    tensors, _ = golden("adapters")
    model = loaded(case)
    expected = tensors[f"{case}/logits"]
    # measured: 8.8 (another transformers made them)
    assert roundings(logits(model, tensors["input_ids"]), expected) <= 16
    assert roundings(logits(model.unload(), tensors["input_ids"]), expected) > 1000


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_is_that_of_the_folder(case):
    made = CASES[case][1]
    config = loaded(case).configs["default"]
    first, last = made.get("prefix_positions", 3), made.get("suffix_positions", 0)
    assert config.parsed_positions.first == first and config.parsed_positions.last == last
    assert config.intervention == {"NoReftConfig": "noreft", "DiReftConfig": "direft"}.get(
        made["config"], "loreft"
    )
    assert config.tied == (made.get("tied_weights", False) or not (first and last))
    assert config.rank == RANK and list(config.layers) == made.get("layers", [0, 1, 2])
    assert (config.dropout, config.dropout_on) == (0.05, "row")
    assert config.activation == made.get("non_linearity")
    assert config.modules_to_save == (("score",) if "head" in made else None)


def test_direft_and_noreft_look_alike():
    """The folder does not distinguish them: the caller must pass the intervention."""
    stored = [json.loads((FOLDERS / folder / "adapter_config.json").read_text()) for folder in
              ("noreft", "direft")]  # fmt: skip
    assert stored[0] == stored[1]
    for case in ("noreft", "direft"):
        with pytest.raises(ValueError, match=r'"noreft" or "direft": adapters does not store sub'):
            load_adapters_reft(FOLDERS / case, base_model())
        with pytest.raises(ValueError, match=r"must be noreft or direft, .*got 'loreft'"):
            loaded(case, intervention="loreft")
    tensors, _ = golden("adapters")
    wrong = loaded("direft", intervention="noreft")
    assert roundings(logits(wrong, tensors["input_ids"]), tensors["direft/logits"]) > 1000


def test_the_caller_may_say_otherwise():
    model = loaded("loreft", positions="f1+l4", dropout=0.0, prompt_end="second_to_last")
    config = model.configs["default"]
    assert (config.positions, config.dropout, config.prompt_end) == (
        "f1+l4", 0.0, "second_to_last",
    )  # fmt: skip
    with pytest.raises(ValueError, match="unit for each side"):
        loaded("loreft", positions="l3")
    kept = loaded("loreft", intervention="direft_orthonormal").configs["default"]
    assert kept.intervention == "direft_orthonormal"


def test_the_head_is_left_alone_unless_asked_for():
    plain = loaded("loreft-classifier", head=False)
    assert torch.equal(plain.base_model.score.weight, base_model(head=True).score.weight)
    taken = loaded("loreft-classifier")
    assert not torch.equal(taken.base_model.score.weight, base_model(head=True).score.weight)
    with pytest.raises(FileNotFoundError, match="pytorch_model_head"):
        loaded("loreft", head=True)


def test_adapters_own_name_of_an_activation(tmp_path):
    folder = shutil.copytree(FOLDERS / "loreft-relu", tmp_path / "leaky")
    _set(folder, non_linearity="LeakyReLU")
    assert loaded("loreft-relu", folder).configs["default"].activation == "leaky_relu"


def _set(folder: Path, **fields) -> None:
    file = folder / "adapter_config.json"
    stored = json.loads(file.read_text())
    stored["config"].update(fields)
    file.write_text(json.dumps(stored))


def _rename(folder: Path, change) -> None:
    file = folder / "adapter.safetensors"
    save_file(
        {new: value.clone() for key, value in load_file(file).items() for new in change(key)}, file
    )


REFUSED = {
    "missing": (shutil.rmtree, "no such adapters folder"),
    "no-config": (lambda f: (f / "adapter_config.json").unlink(), "not an adapters folder"),
    "ours": (
        lambda f: (f / "adapter_config.json").write_text('{"rank": 3}'),
        "not an adapters folder",
    ),
    "no-weights": (
        lambda f: (f / "adapter.safetensors").unlink(),
        r"it has no pytorch_adapter.bin or adapter.safetensors",
    ),
    "lora": (lambda f: _set(f, architecture="lora"), "the architecture 'reft', got 'lora'"),
    "no-sides": (lambda f: _set(f, prefix_positions=0, suffix_positions=0), "positions must be"),
    "odd-activation": (lambda f: _set(f, non_linearity="bump"), r"activation .*'bump'"),
    "broken-fields": (lambda f: _set(f, non_linearity=3), "must have prefix_positions"),
    "two-stacks": (
        lambda f: _rename(f, lambda k: [k, k.replace("model.", "encoder.")]),
        "one adapter of one stack .*'edit' in encoder.layers, 'edit' in model.layers",
    ),
    "foreign-tensor": (
        lambda f: _rename(f, lambda k: [k.replace("reft_layer", "lora")]),
        "not a tensor of a ReFT adapter",
    ),
    "no-bias": (
        lambda f: _rename(f, lambda k: [] if k.endswith("bias") else [k]),
        "unit 0 of layer 0 must hold W, b and a projection",
    ),
    "a-unit-short": (
        lambda f: _rename(f, lambda k: [] if ".1.reft_layer" in k and "units.1" in k else [k]),
        "layers 1 have one, layers 0, 2 have two",
    ),
    "layer-beyond-the-model": (
        lambda f: _rename(f, lambda k: [k.replace("layers.2.", "layers.12.")]),
        "got 12",
    ),
    "damaged": (
        lambda f: (f / "adapter.safetensors").write_bytes(b"\0" * 99),
        "not a safetensors file",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_folder(name, tmp_path):
    break_it, message = REFUSED[name]
    folder = shutil.copytree(FOLDERS / "loreft-safetensors", tmp_path / "broken")
    break_it(folder)
    base = base_model()
    before = untouched(base)
    with pytest.raises((ValueError, OSError)) as caught:
        load_adapters_reft(folder, base)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert untouched(base) == before
