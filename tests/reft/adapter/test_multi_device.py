"""A base spread over devices. This machine has one, so that its parts are told apart by label
("cpu", "cpu:0"), by offloading to disk, and by the meta device."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import LAYERS, gpt2, llama, padded, tokens
from transformers import AutoModelForCausalLM

from reft import ReftConfig, ReftModel, get_reft_model
from reft.adapter.multi_device import MultiDeviceParameters
from reft.adapter.parameters import AdapterParameters
from reft.model.batch import BatchAdapter
from reft.model.forward_plan import ForwardPlan

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
                "reft.model.adapters.block_device",
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
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    gradients = None
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        if gradients is None:
            gradients = {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits, gradients


@pytest.mark.parametrize("base", [llama, gpt2])
@pytest.mark.parametrize("intervention", MEMBERS)
def test_parts_equal_one_adapter(base, intervention, spread):
    """Compare with one device: the initialisation is equal bit for bit, training to the rounding of
    a product over two matrices or three."""
    cfg = config(intervention=intervention)
    single, multi = plain(base(), cfg), spread(base(), cfg)
    adapter = multi.base_model.reft.adapter("default")
    assert isinstance(adapter, MultiDeviceParameters)
    assert [part.layers for part in adapter.parts] == [(0, 2), (1,)]
    whole, parts = (
        single.base_model.reft.adapter("default").training_state(),
        adapter.training_state(),
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    assert single.get_nb_trainable_parameters() == multi.get_nb_trainable_parameters()
    expected, first = run(single)
    got, second = run(multi)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert len(second) == 2 * len(first)
    assert multi.orthonormality_error() < 1e-5
    whole, parts = (
        single.base_model.reft.adapter("default").training_state(),
        adapter.training_state(),
    )
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("state", [False, True])
def test_files_fit_either_way(spread, tmp_path, state):
    single, multi = plain(llama(), config()), spread(llama(), config())
    run(single), run(multi)
    for name, model in (("one", single), ("two", multi)):
        model.save_pretrained(tmp_path / name, training_state=state)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    for name, value in files[0].items():
        torch.testing.assert_close(files[1][name], value, rtol=1e-4, atol=1e-5)
    ids = tokens(2, 7)
    with torch.no_grad():
        expected = single(ids).logits
        from_two = ReftModel.from_pretrained(llama(), tmp_path / "two")
        torch.testing.assert_close(from_two(ids).logits, expected)
        # The same file gives the same bits, in parts or not.
        in_parts = spread(llama(), None, tmp_path / "two")
        assert torch.equal(in_parts(ids).logits, from_two(ids).logits)
        from_one = spread(llama(), None, tmp_path / "one")
        assert isinstance(from_one.base_model.reft.adapter("default"), MultiDeviceParameters)
        torch.testing.assert_close(from_one(ids).logits, expected)
    if state:
        fresh = spread(llama(), config())
        fresh.restore(tmp_path / "one")
        torch.testing.assert_close(run(fresh)[0], run(single)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("intervention", "init"),
    [*((name, "pyreft") for name in MEMBERS), ("loreft", "identity"), ("direft", "identity")],
)
def test_assign_equals_one_adapter(intervention, init, spread):
    cfg = config(intervention=intervention, init=init)
    single, multi = (
        model.base_model.reft.adapter("default")
        for model in (plain(llama(), cfg), spread(llama(), cfg))
    )
    assert (single.shape, single.layers, single.activation) == (
        multi.shape,
        multi.layers,
        multi.activation,
    )
    for adapter in (single, multi):
        adapter.reset_parameters(torch.Generator().manual_seed(7))
    expected = single.training_state()
    assert all(torch.equal(value, expected[name]) for name, value in multi.training_state().items())
    values = {"rotation": torch.rand(single.shape), "bias": torch.rand(single.shape[:3])}
    if single.spec.orthonormal:
        values["rotation"] = torch.linalg.qr(values["rotation"].mT).Q.mT
    if single.weight is not None:
        values["weight"] = torch.rand(single.shape)
    single.assign(**values)
    multi.assign(**values)
    torch.testing.assert_close(multi.rotation(), single.rotation())
    torch.testing.assert_close(multi.rotation(), values["rotation"])
    for expected, weights in zip(single.edit_weights(), multi.edit_weights(), strict=True):
        torch.testing.assert_close(weights[:3], expected[:3])
        assert weights[3:] == expected[3:]
    multi.rotation().pow(3).sum().backward()
    trained = "free" if single.spec.orthonormal else "decode"
    assert all(getattr(part, trained).grad.abs().max() > 0 for part in multi.parts)


def test_values_are_drawn_on_the_device_of_the_generator():
    """The values are those of one device, though the first layer's device has no values at all."""
    meta, draw = torch.device("meta"), torch.Generator
    whole = AdapterParameters(
        config(), (0, 1, 2), 8, generator=draw().manual_seed(5)
    ).export_state_dict()
    adapter = MultiDeviceParameters(
        config(), (0, 1, 2), 8, devices=[meta, FIRST, FIRST], generator=draw().manual_seed(5)
    )
    for name, value in adapter.parts[1].export_state_dict().items():
        assert torch.equal(value, whole[name][1:])
    with pytest.raises(ValueError, match="rank must be at most D = 2"):
        MultiDeviceParameters(config(), (0, 1), 2, devices=[FIRST, SECOND])


def test_a_loaded_adapter_starts_anew_as_its_configuration_says(spread, tmp_path):
    plain(llama(), config(init="identity")).save_pretrained(tmp_path)
    states = []
    for model in (
        ReftModel.from_pretrained(llama(), tmp_path),
        spread(llama(), None, tmp_path),
    ):
        adapter = model.base_model.reft.adapter("default")
        adapter.reset_parameters(torch.Generator().manual_seed(7))
        states.append(adapter.training_state())
    assert not states[0]["bias"].any()
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


@pytest.mark.parametrize("method", ["load", "assign"])
def test_what_is_refused_changes_no_part(method, spread, tmp_path):
    plain(llama(), config(tied=True)).save_pretrained(tmp_path)
    adapter = spread(llama(), None, tmp_path).base_model.reft.adapter("default")
    before, values = adapter.training_state(), adapter.export_state_dict()
    stored = load_file(tmp_path / "adapter_model.safetensors")
    broken = {**values, "bias": values["bias"] + 1, "rotation": values["rotation"].clone()}
    broken["rotation"][1] = 0  # of the second part
    give = adapter.load if method == "load" else lambda tensors: adapter.assign(**tensors)
    with pytest.raises(ValueError, match="orthonormal rows"):
        give(broken)
    with pytest.raises(ValueError, match=r"bias must have shape \(3, "):
        give({**values, "bias": values["bias"][:2]})
    after = adapter.training_state()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert all(torch.equal(after[name], value) for name, value in stored.items())


def test_a_trainer_continues_it(spread, make_trainer, word_llama, tmp_path):
    """The coordinates of R are not decayed in any part, and a resumed run ends in the same bits."""

    def trainer(folder):
        cfg = ReftConfig(rank=4, positions="f2+l2", dropout=0.1)
        model = spread(copy.deepcopy(word_llama), cfg)
        saving = {"save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}
        return make_trainer(folder, model=model, **saving)

    through, resumed = trainer("through"), trainer("resumed")
    ends = {name.rpartition(".")[2] for name in through.get_decay_parameter_names(through.model)}
    assert "weight" in ends and "free" not in ends
    through.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-3"))
    expected, got = (
        trainer.model.base_model.reft.adapter("default").training_state()
        for trainer in (through, resumed)
    )
    assert isinstance(resumed.model.base_model.reft.adapter("default"), MultiDeviceParameters)
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


def test_a_state_dict_of_parts(spread, tmp_path):
    """Gathered state dicts and copies give the same bits."""
    model, ids = spread(llama(), config()), tokens(2, 7)
    run(model)
    model.save_pretrained(tmp_path, training_state=True, state_dict=model.state_dict())
    other = spread(llama(), config())
    other.restore(tmp_path)
    third = spread(llama(), config())
    run(third, steps=1)
    third.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(ids).logits
        for copied in (other, third, copy.deepcopy(model)):
            assert torch.equal(copied(ids).logits, expected)


def test_several_adapters_and_deletion(spread, monkeypatch):
    model = spread(llama(), config(tied=True))
    second = model.base_model.model.layers[1]
    monkeypatch.setattr(
        "reft.model.adapters.block_device", lambda block: SECOND if block is second else FIRST
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


def test_meta_blocks_get_meta_parameters(tmp_path):
    """The skeleton of a model too large to be here: every layer's part is where the layer is."""
    base = llama()
    base.model.layers[2].to("meta")
    model = get_reft_model(base, config())
    adapter = model.base_model.reft.adapter("default")
    assert isinstance(adapter, MultiDeviceParameters) and adapter.is_meta
    assert [part.bias.device.type for part in adapter.parts] == ["cpu", "meta"]
    rows = (torch.tensor([0]), torch.tensor([5]))
    plan = ForwardPlan([BatchAdapter("default", adapter)], [rows], (1, 6))
    assert plan.edits[0, "block_output"][0].rows is plan.edits[1, "block_output"][0].rows
    for layer, kind in ((0, "cpu"), (1, "cpu"), (2, "meta")):
        (edit,) = plan.edits[layer, "block_output"]
        assert {edit.rows.rows.device.type, edit.weights.decode.device.type} == {kind}
        assert edit.weights.decode.shape == (2, 3, 24)
    plain(llama(), config()).save_pretrained(tmp_path)
    base = model.unload()
    with pytest.raises(ValueError, match="base_model must be on a real device"):
        ReftModel.from_pretrained(base, tmp_path)


def test_nothing_is_split_on_one_device():
    assert isinstance(
        plain(llama(), config()).base_model.reft.adapter("default"), AdapterParameters
    )


#: What is on disk.
PLACES = {
    "a block": ["model.layers.1"],
    "all blocks": [f"model.layers.{layer}" for layer in range(LAYERS)],
    "the attention of a block": ["model.layers.1.self_attn"],
    "the MLP of a block": ["model.layers.1.mlp"],
}


def device_map(on_disk):
    """accelerate's, as fine as what is on disk."""
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    parts = ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        finer = any(name.startswith(f"{block}.") for name in on_disk)
        names += [f"{block}.{part}" for part in parts] if finer else [block]
    return {name: "disk" if name in on_disk else "cpu" for name in names}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
def test_device_map(places, component, tmp_path):
    """accelerate loads modules from disk for the time of their forward; edits and gradients are
    the same."""
    llama().save_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=device_map(PLACES[places]),
        offload_folder=tmp_path / "offload",
    )
    assert any(parameter.is_meta for parameter in base.model.layers[1].parameters())
    cfg = config(component=component)
    model, expected = plain(base, cfg), plain(llama(), cfg)
    assert not model.base_model.reft.adapter("default").is_meta
    ids = tokens(2, 7)
    how = {"max_new_tokens": 4, "do_sample": False}
    assert model.generate(ids, **how).tolist() == expected.generate(ids, **how).tolist()
    for wrapped in (model, expected):
        wrapped.zero_grad()
        wrapped(ids, labels=ids).loss.backward()
    wanted = dict(expected.base_model.reft.named_parameters())
    for name, parameter in model.base_model.reft.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad)
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    again = ReftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected(ids).logits)
