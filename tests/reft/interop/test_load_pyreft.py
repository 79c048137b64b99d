"""Loading folders of pyreft: logits equal to pyreft's."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from foreign import cases, contents, golden, logits, roundings
from make_fixtures import CLASSES, FIXTURES, RANK, base_model

from reft import ReftModel, load_pyreft

CASES = cases("pyreft", "pyreft-old")


def loaded(case: str, **said) -> ReftModel:
    """Load a case with the settings that a user would pass."""
    _, made = CASES[case]
    base = base_model("head" in made).to(getattr(torch, made["dtype"]))
    folder = FIXTURES / "pyreft" / case
    if made["save"] == "trainer":
        folder = folder / "checkpoint-4"
        if made["intervention"] == "noreft":
            said.setdefault("intervention", "noreft")
    said = {"positions": made["positions"], "activation": made["activation"], **said}
    return load_pyreft(folder, base, **said)


# ------------------------------------------------------------------- loading


@pytest.mark.parametrize("case", CASES)
def test_logits_are_pyrefts(case):
    library, made = CASES[case]
    tensors, _ = golden(library)
    model = loaded(case)
    expected = tensors[f"{case}/logits"]
    # measured: 3.6; in bfloat16 1.0
    assert roundings(logits(model, tensors["input_ids"]), expected) <= 8
    unedited = logits(model.unload(), tensors["input_ids"])
    assert roundings(unedited, expected) > (50 if made["dtype"] == "bfloat16" else 1000)


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_says_what_pyreft_was_told(case):
    _, made = CASES[case]
    model = loaded(case, dropout=0.1, short_prompts="paper", prompt_end="second_to_last")
    config = model.configs["default"]
    assert config.intervention == made["intervention"]
    assert (config.rank, config.tied) == (RANK, made["tied"])
    assert list(config.layers) == sorted(made["layers"])
    assert (config.positions, config.activation) == (made["positions"], made["activation"])
    assert (config.dropout, config.dropout_on) == (0.1, "row")
    assert (config.short_prompts, config.prompt_end) == ("paper", "second_to_last")
    component = made["component"]
    if "%s" in component:
        component = "module:mlp" if "mlp" in component else "block_output"
    assert (config.component, config.dtype) == (component, "float32")
    assert config.block_path == ("model.layers" if "%s" in made["component"] else None)
    assert config.modules_to_save == (("score",) if "head" in made else None)
    assert not model.training and not any(
        parameter.requires_grad for parameter in model.parameters()
    )


def test_the_two_direfts_change_names():
    """pyreft's Nodireft is the paper's DiReFT; its Direft has an orthonormal R."""
    for ours in ("direft", "direft_orthonormal"):
        stored = json.loads((FIXTURES / "pyreft" / ours / "config.json").read_text())
        assert set(stored["intervention_types"]) == {
            f"<class 'pyreft.interventions.{CLASSES[ours]}'>"
        }
        assert loaded(ours).configs["default"].intervention == ours
    assert CLASSES["direft"] == "NodireftIntervention"


@pytest.mark.parametrize("case", ["loreft-bfloat16", "loreft-untied", "direft-bias"])
def test_values_are_kept_exactly(case):
    model = loaded(case)
    adapter = model.base_model.reft.adapter("default")
    for name, stored in contents(FIXTURES / "pyreft" / case).items():
        layer, side = map(int, re.search(r"layer_(\d)_.*#(\d)", name).groups())
        weight = stored.get("weight", stored.get("learned_source.weight"))
        bias = stored.get("bias", stored.get("learned_source.bias"))
        assert weight.dtype == getattr(torch, CASES[case][1]["dtype"])
        assert torch.equal(adapter.weight[layer, side], weight.float())
        assert torch.equal(adapter.bias[layer, side], bias.float())
    assert adapter.weight.dtype == torch.float32


def test_what_is_all_in_half_precision_is_held_in_float32(tmp_path):
    folder = shutil.copytree(FIXTURES / "pyreft" / "noreft-bias", tmp_path / "half")
    for name, stored in contents(folder).items():
        half = {key: value.bfloat16() for key, value in stored.items() if value.ndim}
        torch.save(half, folder / name)
    model = load_pyreft(folder, base_model(), positions="l1")
    adapter = model.base_model.reft.adapter("default")
    for name, stored in contents(folder).items():
        layer = int(name.split("_")[2])
        assert torch.equal(adapter.decode[layer, 0], stored["proj_layer.weight"].float())
        folded = stored["learned_source.bias"].float() - stored["proj_layer.bias"].float()
        assert torch.equal(adapter.bias[layer, 0], folded)


def test_a_bias_of_the_projection_is_folded():
    adapter = loaded("noreft-bias").base_model.reft.adapter("default")
    for name, stored in contents(FIXTURES / "pyreft" / "noreft-bias").items():
        layer = int(name.split("_")[2])
        folded = stored["learned_source.bias"] - stored["proj_layer.bias"]
        assert torch.equal(adapter.bias[layer, 0], folded)


def test_the_trained_head_is_loaded_and_given_back():
    model = loaded("loreft-classifier")
    stored = torch.load(FIXTURES / "pyreft/loreft-classifier/pytorch_model.bin", weights_only=True)
    assert torch.equal(model.base_model.score.weight, stored["score.weight"])
    score = base_model(head=True).score.weight
    assert torch.equal(model.unload().score.weight, score)
    assert torch.equal(loaded("loreft-classifier", head=False).base_model.score.weight, score)


def test_lora_belongs_to_peft(tmp_path):
    peft = pytest.importorskip("peft")
    folder = shutil.copytree(FIXTURES / "pyreft" / "loreft", tmp_path / "both")
    base = peft.get_peft_model(base_model(), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    lora = {
        name: parameter for name, parameter in base.named_parameters() if parameter.requires_grad
    }
    torch.save(lora, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"a LoRA of PEFT \({len(lora)} tensors .*head=False"):
        load_pyreft(folder, base, positions="f3+l2")
    model = load_pyreft(folder, base, positions="f3+l2", head=False)
    tensors = golden("pyreft")[0]  # a LoRA that nobody trained changes nothing
    assert roundings(logits(model, tensors["input_ids"]), tensors["loreft/logits"]) <= 8


def test_it_can_be_trained_on_and_saved(tmp_path):
    model = loaded("loreft-untied", is_trainable=True, adapter_name="theirs")
    ids = golden("pyreft")[0]["input_ids"]
    model(input_ids=ids, labels=ids, prompt_lengths=[11, 11]).loss.backward()
    adapter = model.base_model.reft.adapter("theirs")
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters()
    )
    model.save_pretrained(tmp_path)
    again = ReftModel.from_pretrained(base_model(), tmp_path)
    # measured: 2.1
    assert roundings(logits(again, ids), golden("pyreft")[0]["loreft-untied/logits"]) <= 8


def test_a_trainer_checkpoint_is_found_from_outside_and_inside():
    outside = FIXTURES / "pyreft" / "loreft-trainer" / "checkpoint-4"
    for folder in (outside, outside / "intervenable_model", str(outside)):
        model = load_pyreft(folder, base_model(), positions="f3+l3")
        assert model.configs["default"].layers == (0, 1, 2)


def test_what_the_tensors_tell_alone():
    """A checkpoint of pyreft's trainer does not name the class."""
    folder = FIXTURES / "pyreft" / "noreft-trainer" / "checkpoint-4"
    with pytest.raises(ValueError, match=r'intervention must be given, "noreft" or "direft"'):
        load_pyreft(folder, base_model(), positions="l1")
    for name in ("noreft", "direft"):
        model = load_pyreft(folder, base_model(), positions="l1", intervention=name)
        assert model.configs["default"].intervention == name
    with pytest.raises(ValueError, match=r"must be noreft or direft, .*; got 'loreft'"):
        load_pyreft(folder, base_model(), positions="l1", intervention="loreft")
    assert loaded("direft_orthonormal-trainer").configs["default"].intervention == (
        "direft_orthonormal"
    )


def test_a_constant_edit_without_a_class_is_ambiguous(tmp_path):
    folder = shutil.copytree(FIXTURES / "pyreft" / "consreft", tmp_path / "bare")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r'"consreft" or "lobireft"'):
        load_pyreft(folder, base_model(), positions="f3+l2")
    tensors = golden("pyreft")[0]
    model = load_pyreft(folder, base_model(), positions="f3+l2", intervention="consreft")
    assert roundings(logits(model, tensors["input_ids"]), tensors["consreft/logits"]) <= 8


@pytest.mark.parametrize("case", ["loreft-string", "loreft-string_mlp", "old-string"])
def test_a_module_named_by_its_path_without_a_config(case, tmp_path):
    folder = shutil.copytree(FIXTURES / "pyreft" / case, tmp_path / "bare")
    (folder / "config.json").unlink()
    library, _ = CASES[case]
    model = load_pyreft(folder, base_model(), positions="f3+l2")
    tensors = golden(library)[0]
    assert roundings(logits(model, tensors["input_ids"]), tensors[f"{case}/logits"]) <= 8


def test_a_class_of_ones_own_needs_the_callers_word(tmp_path):
    folder = shutil.copytree(FIXTURES / "pyreft" / "noreft", tmp_path / "own")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace("pyreft.interventions.NoreftIntervention", "__main__.MyIntervention")
    )
    with pytest.raises(ValueError, match="must name a class of pyreft, got 'MyIntervention'"):
        load_pyreft(folder, base_model(), positions="f3+l3")
    tensors = golden("pyreft")[0]
    model = load_pyreft(folder, base_model(), positions="f3+l3", intervention="noreft")
    assert roundings(logits(model, tensors["input_ids"]), tensors["noreft/logits"]) <= 8
