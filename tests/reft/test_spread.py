"""A base spread over devices. This machine has one, so that its parts are told apart by label
("cpu", "cpu:0"), by offloading to disk, and by the meta device."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import LAYERS, gpt2, llama, padded, tokens
from transformers import AutoModelForCausalLM

from reft import ReftConfig, ReftModel, get_reft_model
from reft.model.plan import ForwardPlan, Member
from reft.nn.bank import Bank
from reft.nn.spread import SpreadBank

FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 0)
MEMBERS = ["loreft", "direft", "consreft"]


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 3, "positions": "f2+l2", "tied": False, **changes})


@pytest.fixture
def spread(monkeypatch):
    """Wraps a model as if its blocks were on two devices, the second block on the second."""

    def wrap(base, cfg, path=None, **how):
        blocks = base.model.layers if hasattr(base, "model") else base.transformer.h
        second = blocks[1]
        with monkeypatch.context() as patch:
            patch.setattr(
                "reft.model.adapters.site_device",
                lambda block: SECOND if block is second else FIRST,
            )
            if path is not None:
                return ReftModel.from_pretrained(base, path, **how)
            torch.manual_seed(4)
            return get_reft_model(base, cfg)

    return wrap


def plain(base, cfg):
    torch.manual_seed(4)
    return get_reft_model(base, cfg)


def run(model, steps=3):
    """(logits, gradients of the first step) of a few AdamW steps on padded prompts."""
    ids, mask, _ = padded([8, 5, 3], "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    gradients = None
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        if gradients is None:
            gradients = {
                name: one.grad.clone()
                for name, one in model.named_parameters()
                if one.grad is not None
            }
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits, gradients


@pytest.mark.parametrize("base", [llama, gpt2])
@pytest.mark.parametrize("intervention", MEMBERS)
def test_it_is_the_bank_in_parts(base, intervention, spread):
    """The same first values bit for bit, and the same training but for the rounding of a product
    over two matrices or three."""
    cfg = config(intervention=intervention)
    one, two = plain(base(), cfg), spread(base(), cfg)
    bank = two.base_model.reft.bank("default")
    assert isinstance(bank, SpreadBank)
    assert [part.layers for part in bank.parts] == [(0, 2), (1,)]
    whole, parts = one.base_model.reft.bank("default").training_state(), bank.training_state()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    assert one.get_nb_trainable_parameters() == two.get_nb_trainable_parameters()
    expected, first = run(one)
    got, second = run(two)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert len(second) == 2 * len(first)
    assert two.orthonormality_error() < 1e-5
    whole, parts = one.base_model.reft.bank("default").training_state(), bank.training_state()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("state", [False, True])
def test_files_fit_either_way(spread, tmp_path, state):
    one, two = plain(llama(), config()), spread(llama(), config())
    run(one), run(two)
    for name, model in (("one", one), ("two", two)):
        model.save_pretrained(tmp_path / name, training_state=state)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    for name, value in files[0].items():
        torch.testing.assert_close(files[1][name], value, rtol=1e-4, atol=1e-5)
    ids = tokens(2, 7)
    with torch.no_grad():
        expected = one(ids).logits
        from_two = ReftModel.from_pretrained(llama(), tmp_path / "two")
        torch.testing.assert_close(from_two(ids).logits, expected)
        from_one = spread(llama(), None, tmp_path / "one")
        assert isinstance(from_one.base_model.reft.bank("default"), SpreadBank)
        torch.testing.assert_close(from_one(ids).logits, expected)
    if state:
        fresh = spread(llama(), config())
        fresh.restore(tmp_path / "one")
        torch.testing.assert_close(run(fresh)[0], run(one)[0], rtol=1e-4, atol=1e-5)


def test_a_bad_file_changes_no_part(spread, tmp_path):
    model = spread(llama(), config(tied=True))
    bank = model.base_model.reft.bank("default")
    before = bank.training_state()
    broken = dict(before)
    broken["rotation"] = before["rotation"].clone()
    broken["rotation"][1] = 0  # of the second part
    with pytest.raises(ValueError, match="orthonormal rows"):
        bank.load(broken)
    with pytest.raises(ValueError, match=r"bias must have shape \(3, …\)"):
        bank.load({**before, "bias": before["bias"][:2]})
    assert all(torch.equal(value, before[name]) for name, value in bank.training_state().items())


def test_several_adapters_and_deletion(spread, monkeypatch):
    model = spread(llama(), config(tied=True))
    second = model.base_model.model.layers[1]
    monkeypatch.setattr(
        "reft.model.adapters.site_device", lambda block: SECOND if block is second else FIRST
    )
    model.add_adapter("other", config(rank=2, layers=[1, 2], tied=True))
    ids, names = tokens(3, 6), ["other", "default", "__base__"]
    with torch.no_grad():
        together = model(ids, adapter_names=names).logits
        for row, name in enumerate(names):
            alone = model(ids[row : row + 1], adapter_names=[name]).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    model.delete_adapter("default")
    assert model.active_adapter == "other"
    assert sorted(site[0] for site in model.base_model.reft.handles) == [1, 2]
    assert not any("parts" in name for name in dict(model.unload().named_parameters()))


def test_identity_starts_at_the_base(spread):
    base, ids = llama(), tokens(2, 6)
    with torch.no_grad():
        expected = base(ids).logits
        model = spread(base, config(init="identity"))
        assert torch.equal(model(ids).logits, expected)


def test_meta_blocks_get_meta_parameters():
    """The skeleton of a model too large to be here: every layer's part is where the layer is."""
    base = llama()
    base.model.layers[2].to("meta")
    model = get_reft_model(base, config())
    bank = model.base_model.reft.bank("default")
    assert isinstance(bank, SpreadBank) and bank.is_meta
    assert [part.bias.device.type for part in bank.parts] == ["cpu", "meta"]
    plan = ForwardPlan([Member(bank, (torch.tensor([0]), torch.tensor([5])), 0.0)], (1, 6))
    assert plan.edits[0, "block_output"][0].rows is plan.edits[1, "block_output"][0].rows
    for layer, kind in ((0, "cpu"), (1, "cpu"), (2, "meta")):
        (edit,) = plan.edits[layer, "block_output"]
        assert {edit.rows.rows.device.type, edit.decode.device.type} == {kind}
        assert edit.decode.shape == (2, 3, 24)


def test_nothing_is_split_on_one_device():
    assert isinstance(plain(llama(), config()).base_model.reft.bank("default"), Bank)


PLACES = {
    "a block on disk": {"model.layers.1": "disk"},
    "all blocks on disk": {f"model.layers.{n}": "disk" for n in range(LAYERS)},
}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
def test_device_map(places, component, tmp_path):
    """accelerate loads a block from disk for the time of its forward; edits and gradients are the
    same."""
    llama().save_pretrained(tmp_path / "model")
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    placed = {**dict.fromkeys(names, "cpu"), **PLACES[places]}
    placed |= {f"model.layers.{n}": placed.get(f"model.layers.{n}", "cpu") for n in range(LAYERS)}
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=placed, offload_folder=tmp_path / "offload"
    )
    assert next(base.model.layers[1].parameters()).is_meta
    cfg = config(component=component)
    model, expected = plain(base, cfg), plain(llama(), cfg)
    assert not model.base_model.reft.bank("default").is_meta
    ids = tokens(2, 7)
    how = {"max_new_tokens": 4, "do_sample": False}
    assert model.generate(ids, **how).tolist() == expected.generate(ids, **how).tolist()
    for one in (model, expected):
        one.zero_grad()
        one(ids, labels=ids).loss.backward()
    wanted = dict(expected.base_model.reft.named_parameters())
    for name, one in model.base_model.reft.named_parameters():
        torch.testing.assert_close(one.grad, wanted[name].grad)
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    again = ReftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected(ids).logits)
