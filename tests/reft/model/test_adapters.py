"""Several adapters on one base: switching, mixing in one batch, saving and loading."""

from __future__ import annotations

import pytest
import torch
from tiny_models import DIM, LAYERS, llama, padded, tokens

from reft import ReftConfig, ReftModel, get_reft_model
from reft_kernels.spec import FAMILY

IDS = tokens(3, 9)


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 3, "positions": "f2+l2", **changes})


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def trained(model, name="default", seed=1):
    """Move an adapter's parameters, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.reft.adapter(name).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class TestOnDisk:
    @pytest.mark.parametrize("intervention", FAMILY)
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    def test_outputs_survive(self, intervention, tied, tmp_path):
        cfg = config(intervention=intervention, tied=tied, layers=[0, -1])
        model = trained(get_reft_model(llama(), cfg))
        model.save_pretrained(tmp_path / "adapter")
        again = ReftModel.from_pretrained(llama(), tmp_path / "adapter", adapter_name="back")
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
        assert (logits(again) - logits(llama())).abs().max() > 1e-3
        assert again.configs["back"] == model.configs["default"]

    def test_activation_dtype_and_init_survive(self, tmp_path):
        cfg = config(intervention="direft", activation="relu", dtype="bfloat16", init="identity")
        model = trained(get_reft_model(llama(), cfg))
        model.save_pretrained(tmp_path)
        again = ReftModel.from_pretrained(llama(), tmp_path)
        assert torch.equal(logits(again), logits(model))
        assert again.configs["default"] == model.configs["default"]
        assert again.reft.adapter("default").bias.dtype == torch.bfloat16

    @pytest.mark.parametrize("intervention", FAMILY)
    def test_training_goes_on_bit_for_bit(self, intervention, tmp_path):
        cfg = config(intervention=intervention, tied=False)
        model = trained(get_reft_model(llama(), cfg))
        model.save_pretrained(tmp_path, training_state=True)
        twin = get_reft_model(llama(), cfg)
        twin.restore(tmp_path)
        ours, theirs = model.reft.adapter("default"), twin.reft.adapter("default")
        for tensor, other in zip(
            (*ours.parameters(), *ours.buffers()), (*theirs.parameters(), *theirs.buffers()),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(tensor, other)
        assert torch.equal(logits(model), logits(twin))

    def test_restoring_checks_what_it_reads(self, tmp_path):
        model = get_reft_model(llama(), config())
        model.save_pretrained(tmp_path / "published")
        with pytest.raises(ValueError, match=r"missing: rotation\.base, rotation\.free"):
            model.restore(tmp_path / "published")
        other = get_reft_model(llama(), config(positions="l2"))
        other.save_pretrained(tmp_path / "other", training_state=True)
        with pytest.raises(ValueError, match=r"positions = 'l2' \(here 'f2\+l2'\)"):
            model.restore(tmp_path / "other")
        with pytest.raises(FileNotFoundError):
            model.restore(tmp_path / "nowhere")

    def test_trainable_or_not(self, tmp_path):
        get_reft_model(llama(), config()).save_pretrained(tmp_path)
        frozen = ReftModel.from_pretrained(llama().train(), tmp_path)
        assert not any(p.requires_grad for p in frozen.parameters())
        assert not any(module.training for module in frozen.modules())
        free = ReftModel.from_pretrained(llama().train(), tmp_path, is_trainable=True)
        assert free.get_nb_trainable_parameters()[0] == LAYERS * (2 * 3 * DIM + 3)
        assert all(module.training for module in free.modules())

    def test_an_adapter_of_another_model_leaves_nothing(self, tmp_path):
        get_reft_model(llama(), config()).save_pretrained(tmp_path)
        other = llama(num_hidden_layers=2)
        with pytest.raises(ValueError, match=r"must have shape \(2, 1, 3"):
            ReftModel.from_pretrained(other, tmp_path)
        assert not hasattr(other, "reft")
        assert all(p.requires_grad for p in other.parameters())
        model = get_reft_model(llama(num_hidden_layers=2), config(layers=[0]))
        hooks = _hooks(model)
        with pytest.raises(ValueError, match="must have shape"):
            model.load_adapter(tmp_path, "second")
        assert _hooks(model) == hooks
        assert list(model.configs) == ["default"]

    def test_where_the_base_came_from_is_noted(self, tmp_path):
        base = llama()
        base.config._name_or_path = "some/llama"
        model = get_reft_model(base, config())
        model.save_pretrained(tmp_path)
        again = ReftModel.from_pretrained(llama(), tmp_path)
        assert again.configs["default"].base_model_name_or_path == "some/llama"


def _hooks(model):
    return [len(module._forward_hooks) for module in model.base_model.modules()]


class TestSwitching:
    def test_one_is_active_and_trained(self, tmp_path):
        model = get_reft_model(llama(), config(layers=[0]), "a")
        alone = logits(model)
        model.add_adapter("b", config(layers=[1], positions="l1"))
        assert torch.equal(logits(model), alone)
        assert (model.active_adapter, model.active_adapters) == ("a", ["a"])
        model.set_adapter("b")
        assert {n.split(".")[3] for n, p in model.named_parameters() if p.requires_grad} == {"b"}
        other = logits(model)
        assert not torch.equal(other, alone)
        model.set_adapter("a", inference_mode=True)
        assert not any(p.requires_grad for p in model.parameters())
        assert torch.equal(logits(model), alone)
        model.delete_adapter("a")
        assert model.active_adapter == "b"
        assert torch.equal(logits(model), other)
        layers = model.base_model.model.layers
        assert [len(layer._forward_hooks) for layer in layers] == [0, 1, 0]
        model.delete_adapter("b")
        assert model.active_adapter is None
        assert torch.equal(logits(model), logits(llama()))
        with pytest.raises(ValueError, match="adapter_name must be given"):
            model.save_pretrained(tmp_path)

    @pytest.mark.parametrize(
        "name", ["", "a.b", "a/b", "__base__", "default", "keys", "training", 3]
    )
    def test_names_that_cannot_be(self, name):
        model = get_reft_model(llama(), config())
        with pytest.raises(ValueError, match="adapter_name must be a new name"):
            model.add_adapter(name, config())
        assert list(model.configs) == ["default"]

    def test_names_that_are_not_there(self):
        model = get_reft_model(llama(), config())
        for call in (model.set_adapter, model.delete_adapter):
            with pytest.raises(ValueError, match=r"one of the adapters \('default'\), got 'other'"):
                call("other")

    def test_a_first_name_that_cannot_be_leaves_nothing(self):
        base = llama()
        with pytest.raises(ValueError, match="adapter_name"):
            get_reft_model(base, config(), "a.b")
        assert not hasattr(base, "reft")

    def test_loading_a_second_keeps_the_first_active(self, tmp_path):
        trained(get_reft_model(llama(), config(positions="l1"))).save_pretrained(tmp_path)
        model = get_reft_model(llama(), config())
        expected = logits(model)
        model.load_adapter(tmp_path, "second")
        assert torch.equal(logits(model), expected)
        model.set_adapter("second")
        assert not torch.equal(logits(model), expected)

    def test_after_unload_there_are_no_adapters(self):
        model = get_reft_model(llama(), config())
        model.unload()
        with pytest.raises(RuntimeError, match="was unloaded"):
            model.add_adapter("b", config())


#: Adapters that differ in everything that a batch has to bring together.
MIX = {
    "wide": {"rank": 5, "positions": "f3"},
    "narrow": {"rank": 1, "positions": "l2", "layers": [1]},
    "untied": {"rank": 2, "positions": "f1+l3", "tied": False, "layers": [0, 2]},
    "steer": {"intervention": "lobireft", "rank": 1, "positions": "l1"},
    "relu": {"intervention": "direft", "activation": "relu", "rank": 2, "positions": "f2"},
    "prompt": {"intervention": "consreft", "rank": 2, "positions": "prompt"},
    "bf16": {"rank": 2, "positions": "l1", "dtype": "bfloat16"},
}


@pytest.fixture
def mixed():
    first, *rest = MIX
    model = get_reft_model(llama(), ReftConfig(**MIX[first]), first)
    for name in rest:
        model.add_adapter(name, ReftConfig(**MIX[name]))
    for seed, name in enumerate(MIX):
        trained(model, name, seed)
    return model


class TestMixedBatches:
    NAMES = ("narrow", "__base__", *MIX, "untied")

    def test_each_sequence_gets_its_adapter(self, mixed):
        lengths = [7, 5, 9, 4, 8, 3, 6, 9, 2, 5]
        ids, mask, singles = padded(lengths, "right")
        together = logits(mixed, ids, attention_mask=mask, adapter_names=list(self.NAMES))
        seen = set()
        for row, (name, single) in enumerate(zip(self.NAMES, singles, strict=True)):
            if name == "__base__":
                with mixed.disable_adapter():
                    alone = logits(mixed, single)
            else:
                mixed.set_adapter(name)
                alone = logits(mixed, single)
            ours = together[row, : lengths[row]]
            torch.testing.assert_close(ours, alone[0], rtol=1e-5, atol=5e-6)
            seen.add(round(float(ours.sum()), 4))
        assert len(seen) == len(self.NAMES)

    def test_generation(self, mixed):
        ids, mask, singles = padded([6, 3, 5], "left")
        names = ["untied", "__base__", "steer"]
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2}
        out = mixed.generate(ids, attention_mask=mask, adapter_names=names, **settings)
        for row, (name, single) in enumerate(zip(names, singles, strict=True)):
            alone = mixed.generate(single, adapter_names=[name], **settings)
            assert out[row, 6:].tolist() == alone[0, single.shape[1] :].tolist()

    def test_gradients_go_to_the_adapters_of_the_batch(self, mixed):
        names = ["wide", "untied", "wide"]
        for name in names:
            mixed.reft.adapter(name).requires_grad_(True)
        mixed(IDS, adapter_names=names).logits.pow(2).mean().backward()
        got = {n: p.grad.clone() for n, p in mixed.named_parameters() if p.grad is not None}
        assert {name.split(".")[3] for name in got} == {"wide", "untied"}
        mixed.zero_grad()
        total = 0
        for name, rows in (("wide", [0, 2]), ("untied", [1])):
            mixed.set_adapter(name)
            mixed.reft.adapter("wide").requires_grad_(True)
            mixed.reft.adapter("untied").requires_grad_(True)
            total = total + mixed(IDS[rows]).logits.pow(2).sum()
        (total / (3 * 9 * 40)).backward()
        for name, value in got.items():
            expected = mixed.get_parameter(name).grad
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            (["wide"], r"one name per sequence \(3 of them\)"),
            ("wide", "must be a list"),
            (["wide", "nobody", "wide"], "'nobody'"),
        ],
    )
    def test_wrong_names(self, mixed, names, words):
        with pytest.raises(ValueError, match=words):
            mixed(IDS, adapter_names=names)

    def test_only_the_base(self, mixed):
        assert torch.equal(logits(mixed, adapter_names=["__base__"] * 3), logits(llama()))
