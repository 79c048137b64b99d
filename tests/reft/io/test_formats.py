"""Adapters of every form that was ever published are read, and mean what they meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from reft import ReftConfig, ReftModel
from reft.config import FORMAT_VERSION
from reft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter

FORMATS = Path(__file__).resolve().parents[2] / "fixtures" / "formats"
FOLDERS = sorted(path.parent for path in FORMATS.glob("*/*/expected.safetensors"))


def base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(FORMATS / "base").eval()


def stored(folder: Path) -> dict:
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))


def test_there_are_files_of_every_form():
    found = {int(folder.parent.name) for folder in FOLDERS}
    assert found == set(range(1, FORMAT_VERSION + 1))
    for folder in FOLDERS:
        for kind in ("published", "checkpoint"):
            assert stored(folder / kind)["format_version"] == int(folder.parent.name)


def test_a_form_has_the_fields_that_it_had():
    """A field more is another form: an older library refuses it by name."""
    fields = {
        form: {frozenset(stored(one / "published")) for one in FOLDERS if one.parent.name == form}
        for form in ("1", "2")
    }
    [first], [second] = fields["1"], fields["2"]
    assert second - first == {"untied_by", "subspaces"}
    assert second == set(ReftConfig().to_dict())


@pytest.mark.parametrize("kind", ["published", "checkpoint"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda one: f"{one.parent.name}-{one.name}")
def test_it_computes_what_it_did(folder, kind):
    expected = load_file(folder / "expected.safetensors")
    model = ReftModel.from_pretrained(base(), folder / kind).eval()
    with torch.no_grad():
        logits = model(expected["ids"]).logits
        with model.disable_adapter():
            plain = model(expected["ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)
    assert (plain - logits).abs().max() > 1e-2


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda one: f"{one.parent.name}-{one.name}")
def test_it_is_saved_again_as_it_was_but_for_the_form(folder, tmp_path):
    model = ReftModel.from_pretrained(base(), folder / "checkpoint", is_trainable=True)
    model.restore(folder / "checkpoint")
    model.save_pretrained(tmp_path / "published")
    model.save_pretrained(tmp_path / "checkpoint", training_state=True)
    for kind in ("published", "checkpoint"):
        (config, tensors), (old_config, old) = (
            read_adapter(one / kind) for one in (tmp_path, folder)
        )
        assert config == old_config
        assert stored(tmp_path / kind)["format_version"] == FORMAT_VERSION
        assert tensors.keys() == old.keys()
        for name, value in old.items():
            assert tensors[name].dtype == value.dtype
            assert torch.equal(tensors[name], value), name


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 10**30])
def test_a_newer_one_is_refused_by_name(version, tmp_path):
    given = {**ReftConfig().to_dict(), "format_version": version}
    with pytest.raises(
        ValueError, match=f"format_version must be .* got {str(version)[:9]}.*newer"
    ):
        ReftConfig.from_dict(given)
    weights = (FOLDERS[0] / "published" / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(weights)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(given), encoding="utf-8")
    with pytest.raises(ValueError, match="a newer version of reft wrote it, upgrade reft"):
        read_adapter(tmp_path)
