"""Stored adapters load, compute the stored logits, and are saved to the same bits."""

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
KINDS = ("published", "checkpoint")
FOLDERS = sorted(path.parent for path in FORMATS.glob("*/*/expected.safetensors"))


def base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(FORMATS / "base").eval()


def stored_config(folder: Path) -> dict:
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))


def test_fixtures_have_the_current_format_and_its_fields():
    """Another field would be another format, which an older library must refuse by name."""
    assert {folder.parent.name for folder in FOLDERS} == {str(FORMAT_VERSION)}
    for folder in FOLDERS:
        for kind in KINDS:
            stored = stored_config(folder / kind)
            stored.pop("peft_type", None)
            assert stored["format_version"] == FORMAT_VERSION
            assert stored.keys() == ReftConfig().to_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_loaded_fixture_computes_the_stored_logits(folder, kind):
    expected = load_file(folder / "expected.safetensors")
    model = ReftModel.from_pretrained(base(), folder / kind).eval()
    with torch.no_grad():
        logits = model(expected["ids"]).logits
        with model.disable_adapter():
            plain = model(expected["ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)
    assert (plain - logits).abs().max() > 1e-2


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_loaded_fixture_is_saved_to_the_same_bits(folder, tmp_path):
    model = ReftModel.from_pretrained(base(), folder / "checkpoint", is_trainable=True)
    model.restore(folder / "checkpoint")
    model.save_pretrained(tmp_path / "published")
    model.save_pretrained(tmp_path / "checkpoint", training_state=True)
    for kind in KINDS:
        config, tensors = read_adapter(tmp_path / kind)
        old_config, old_tensors = read_adapter(folder / kind)
        assert config == old_config
        assert tensors.keys() == old_tensors.keys()
        for name, old in old_tensors.items():
            assert tensors[name].dtype == old.dtype
            assert torch.equal(tensors[name], old), name


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 10**30])
def test_a_newer_format_is_refused_by_its_number(version, tmp_path):
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
