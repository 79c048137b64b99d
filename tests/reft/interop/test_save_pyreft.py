"""Writing folders for pyreft: equal to pyreft's files and readable by pyreft."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from foreign import contents, logits, roundings
from make_fixtures import CLASSES, FIXTURES, base_model, inputs, places
from transformers import Gemma2Config, Gemma2ForCausalLM

from reft import ReftConfig, ReftModel, get_reft_model, load_pyreft, save_pyreft
from reft.interop.units import orthogonal

#: pyreft 0.1.0 cannot load these folders: it requires an add_bias that it does not store.
UNLOADABLE = ("noreft", "direft")


def adapted(base=None, **fields) -> ReftModel:
    fields = {"rank": 3, "positions": "f3+l3", **fields}
    model = get_reft_model(
        base or base_model(), ReftConfig(**fields), generator=torch.Generator().manual_seed(3)
    )
    adapter = model.base_model.reft.adapter("default")
    with torch.no_grad():
        # Values that bfloat16 represents exactly, because pyreft loads bfloat16.
        for parameter in (adapter.weight, adapter.bias):
            if parameter is not None:
                parameter.copy_((parameter + 0.3 * torch.randn_like(parameter)).bfloat16())
    return model.eval()


def effective(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace the parts of R's parametrisation, which are not unique, by R."""
    state = dict(stored)
    pair = [f"rotate_layer.parametrizations.weight.{part}" for part in ("original", "0.base")]
    if pair[0] in state:
        state["R"] = orthogonal(*(state.pop(part) for part in pair))
    return state


# ------------------------------------------------------------------- against pyreft's own files


@pytest.mark.parametrize(
    "case",
    ["loreft-untied", "loreft-some_layers", "loreft-mlp", "loreft-classifier", "direft",
     "direft_orthonormal", "consreft", "lobireft", "noreft"],
)  # fmt: skip
def test_the_files_are_those_of_pyreft(case, tmp_path):
    theirs = FIXTURES / "pyreft" / case
    head = case == "loreft-classifier"
    # loreft-some_layers was made with its layers in descending order
    model = load_pyreft(theirs, base_model(head), positions="f3+l3")
    save_pyreft(model, tmp_path / "made" / "here")
    ours = tmp_path / "made" / "here"
    written, expected = contents(ours), contents(theirs)
    if not head:
        assert written.pop("pytorch_model.bin") == {}
    assert written.keys() == expected.keys()
    for file, stored in expected.items():
        for name, value in effective(stored).items():
            written_value = effective(written[file])[name]
            assert written_value.dtype == value.dtype and written_value.shape == value.shape
            torch.testing.assert_close(written_value, value, atol=2e-6, rtol=0)
        if not file.startswith("pytorch"):
            assert written[file].keys() == stored.keys()
    config, reference = (
        json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)
    )
    del reference["transformers_version"]
    rows = [sorted(zip(*(described.pop(name) for name in ("sorted_keys", "representations")),
                       strict=True)) for described in (config, reference)]  # fmt: skip
    assert rows[0] == rows[1] and config == reference
    assert [path.name for path in ours.parent.iterdir()] == ["here"]


@pytest.mark.parametrize(
    ("name", "tied"), [*((name, True) for name in CLASSES), ("loreft", False), ("noreft", False)]
)
def test_there_and_back(name, tied, tmp_path):
    model = adapted(intervention=name, tied=tied, layers=[0, 2])
    save_pyreft(model, tmp_path / "out")
    again = load_pyreft(tmp_path / "out", base_model(), positions="f3+l3")
    assert again.configs["default"].tied == tied
    assert again.configs["default"].layers == (0, 2)
    ours, theirs = (loaded.base_model.reft.adapter("default") for loaded in (model, again))
    for name in ("weight", "bias"):
        value = getattr(ours, name)
        assert value is None or torch.equal(value, getattr(theirs, name))
    assert roundings(logits(again, inputs()), logits(model, inputs())) <= 8  # measured: 4.0


def test_what_is_written_can_be_trained_on(tmp_path):
    """pyreft trains R in the whole space, so the D × D matrix must span it."""
    save_pyreft(adapted(intervention="consreft"), tmp_path / "out")
    for stored in contents(tmp_path / "out").values():
        for base in (value for name, value in stored.items() if name.endswith("0.base")):
            torch.testing.assert_close(base @ base.mT, torch.eye(16), atol=1e-5, rtol=0)


def test_a_named_adapter_and_half_precision(tmp_path):
    model = adapted()
    model.add_adapter("other", ReftConfig(rank=2, dtype="bfloat16", intervention="noreft"))
    save_pyreft(model, tmp_path / "out", "other")
    stored = contents(tmp_path / "out")["intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"]
    adapter = model.base_model.reft.adapter("other")
    assert torch.equal(stored["proj_layer.weight"], adapter.decode[1, 0])
    assert stored["learned_source.weight"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="adapter_name must be one of"):
        save_pyreft(model, tmp_path / "second", "none")
    model.delete_adapter("default")
    model.delete_adapter("other")
    with pytest.raises(ValueError, match="no adapter is active"):
        save_pyreft(model, tmp_path / "second")
    assert not (tmp_path / "second").exists()


# ------------------------------------------------------------------- atomic writing


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    saved, count = torch.save, []

    def failing(*args, **kwargs):
        count.append(1)
        if len(count) == 3:
            raise OSError("disk full")
        return saved(*args, **kwargs)

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="disk full"):
        save_pyreft(adapted(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_never_mixed_in(tmp_path):
    model = adapted()
    (tmp_path / "out").mkdir()
    save_pyreft(model, tmp_path / "out")
    with pytest.raises(FileExistsError, match="new or empty"):
        save_pyreft(model, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        save_pyreft(model, tmp_path / "file")


def test_a_component_without_a_name_in_pyreft_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"component must be one .*'module:mlp.act_fn'"):
        save_pyreft(_other_component(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _other_component() -> ReftModel:
    base = base_model()
    model = adapted(base)
    adapter = base.reft.adapter("default")
    adapter.config = ReftConfig.from_dict(
        {**adapter.config.to_dict(), "component": "module:mlp.act_fn"}
    )
    return model


# ------------------------------------------------------------------- pyreft itself


@pytest.fixture(scope="module")
def pyreft():
    return pytest.importorskip("pyreft")


def _theirs(model, tied: bool, layers: int) -> torch.Tensor:
    ids = inputs()
    where = places("f3+l3", tied, layers, ids.shape[1])
    with torch.no_grad():
        _, output = model(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            unit_locations={"sources->base": (None, [[row] * ids.shape[0] for row in where])},
        )
    return output.logits


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "tied", "component"),
    [
        ("loreft", True, "block_output"),
        ("loreft", False, "mlp_output"),
        ("direft_orthonormal", True, "attention_output"),
        ("direft_orthonormal", False, "block_output"),
        ("consreft", True, "mlp_output"),
        ("consreft", False, "attention_output"),
        ("lobireft", True, "block_output"),
        ("lobireft", False, "mlp_output"),
    ],
)
def test_pyreft_loads_the_folder(pyreft, name, tied, component, tmp_path):
    ours = adapted(intervention=name, tied=tied, layers=[0, 2], component=component)
    save_pyreft(ours, tmp_path / "out")
    loaded = pyreft.ReftModel.load(str(tmp_path / "out"), base_model(), include_model=True)
    # pyreft converts W and b to bfloat16, which cannot be multiplied with a float32 base.
    loaded.interventions.float()
    # measured: 5.2
    assert roundings(_theirs(loaded, tied, 2), logits(ours, inputs())) <= 8


@pytest.mark.peer
@pytest.mark.parametrize("name", UNLOADABLE)
def test_what_pyreft_cannot_load_fits_its_classes(pyreft, name, tmp_path):
    ours = adapted(intervention=name, layers=[0, 2], activation="gelu")
    save_pyreft(ours, tmp_path / "out")
    with pytest.raises(KeyError, match="add_bias"):
        pyreft.ReftModel.load(str(tmp_path / "out"), base_model())
    representations = []
    for file, stored in contents(tmp_path / "out").items():
        if file.startswith("intkey"):
            kind = getattr(pyreft.interventions, CLASSES[name])
            module = kind(embed_dim=16, low_rank_dimension=3, dtype=torch.float32,
                          act_fn="gelu", add_bias=False)  # fmt: skip
            module.load_state_dict(stored)
            layer = int(re.search(r"layer_(\d)", file)[1])
            representations.append(
                {"layer": layer, "component": "block_output", "intervention": module}
            )
    theirs = pyreft.get_reft_model(base_model(), pyreft.ReftConfig(representations=representations))
    assert roundings(_theirs(theirs, True, 2), logits(ours, inputs())) <= 8  # measured: 0


@pytest.mark.peer
def test_pyreft_loads_the_head(pyreft, tmp_path: Path):
    folder = FIXTURES / "pyreft" / "loreft-classifier"
    ours = load_pyreft(folder, base_model(head=True), positions="f3+l3")
    save_pyreft(ours, tmp_path / "out")
    loaded = pyreft.ReftModel.load(str(tmp_path / "out"), base_model(head=True), include_model=True)
    loaded.interventions.float()
    for key, module in loaded.interventions.items():
        module.load_state_dict(torch.load(tmp_path / "out" / f"intkey_{key}.bin"))
    assert torch.equal(loaded.model.score.weight, ours.base_model.score.weight)
    assert roundings(_theirs(loaded, True, 3), logits(ours, inputs())) <= 8


# ------------------------------------------------------------------- norms after submodules


def gemma2():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, initializer_range=0.3,
        attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("ours", "theirs"), [("module:mlp", "mlp_output"), ("module:self_attn", "attention_output")]
)
def test_pyrefts_names_are_of_the_part_before_its_norm(ours, theirs, tmp_path):
    model = adapted(gemma2(), component=ours, layers=[0, 2])
    save_pyreft(model, tmp_path / "out")
    (name, *_) = contents(tmp_path / "out")
    assert f"comp_{theirs}_unit" in name
    again = load_pyreft(tmp_path / "out", gemma2(), positions="f3+l3")
    assert again.configs["default"].component == ours
    assert roundings(logits(again, inputs()), logits(model, inputs())) <= 8
    other = adapted(gemma2(), component=theirs)
    with pytest.raises(ValueError, match=rf"'{theirs}' of this model is the output of a norm"):
        save_pyreft(other, tmp_path / "second")
    assert not (tmp_path / "second").exists()


@pytest.mark.peer
@pytest.mark.parametrize("component", ["module:mlp", "module:self_attn", "block_output"])
def test_pyreft_edits_the_same_place_of_gemma2(pyreft, component, tmp_path):
    ours = adapted(gemma2(), component=component, layers=[0, 2])
    save_pyreft(ours, tmp_path / "out")
    loaded = pyreft.ReftModel.load(str(tmp_path / "out"), gemma2(), include_model=True)
    loaded.interventions.float()
    assert roundings(_theirs(loaded, True, 2), logits(ours, inputs())) <= 16
