"""The parameters of an adapter: names and shapes, weights for the edit, saving and loading."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from random_parameters import DIM, RANK, make_adapter
from transformers.activations import ACT2FN

from reft.adapter.parameters import AdapterParameters
from reft.config import ReftConfig
from reft_kernels import orthonormalize
from reft_kernels.activations import ACTIVATIONS, ALIASES, activate
from reft_kernels.spec import FAMILY

PARAMETERS = {
    "loreft": {"weight", "bias", "free"},
    "direft": {"weight", "bias", "decode"},
    "noreft": {"weight", "bias", "decode"},
    "direft_orthonormal": {"weight", "bias", "free"},
    "consreft": {"bias", "free"},
    "lobireft": {"bias", "free"},
}


def moved(adapter: AdapterParameters) -> AdapterParameters:
    """Move every parameter away from its initialisation, as training does."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter


def test_every_family_row_is_here():
    assert PARAMETERS.keys() == FAMILY.keys()


@pytest.mark.parametrize("intervention", FAMILY)
def test_parameters_of_each_family_row(intervention):
    adapter = make_adapter(intervention)
    shapes = {
        "weight": (3, 2, RANK, DIM),
        "bias": (3, 2, RANK),
        "free": (3, 2, DIM, RANK),
        "decode": (3, 2, RANK, DIM),
    }
    shapes_by_name = {name: tuple(p.shape) for name, p in adapter.named_parameters()}
    assert shapes_by_name == {name: shapes[name] for name in PARAMETERS[intervention]}
    start = {"base"} if "free" in PARAMETERS[intervention] else set()
    assert set(adapter.state_dict()) == PARAMETERS[intervention] | start


@pytest.mark.parametrize("intervention", FAMILY)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_edit_weights_compute_the_edit(intervention, activation):
    adapter = moved(make_adapter(intervention, activation=activation))
    spec = FAMILY[intervention]
    out, r = adapter(), adapter.rotation()
    h = torch.randn(7, DIM)
    act = torch.relu if activation else lambda x: x
    for layer in range(3):
        for group in range(2):
            code = adapter.bias[layer, group].expand(7, -1)
            if adapter.weight is not None:
                code = code + h @ adapter.weight[layer, group].T
            code = act(code) - (h @ r[layer, group].T if spec.subtract else 0)
            weights = out[layer]
            folded = weights.bias[group].expand(7, -1)
            if weights.encode is not None:
                folded = folded + h @ weights.encode[group].T
            if weights.activation:
                folded = act(folded)
            if weights.subtract:
                folded = folded - h @ weights.decode[group].T
            torch.testing.assert_close(folded, code, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(weights.decode[group], r[layer, group])
            assert weights.subtract == (
                activation is not None and spec.subtract and spec.has_encode
            )


def test_edit_weights_share_no_memory_with_parameters():
    for intervention in FAMILY:
        adapter = make_adapter(intervention)
        memory = {p.untyped_storage().data_ptr() for p in adapter.parameters()}
        out = adapter.edit_weights()
        for part in (tensor for layer in out for tensor in layer[:3] if tensor is not None):
            assert part.untyped_storage().data_ptr() not in memory, intervention


def test_autocast_does_not_change_edit_weights():
    adapter = moved(make_adapter())
    expected = adapter.edit_weights()
    with torch.autocast("cpu", torch.bfloat16):
        got = adapter.edit_weights()
    for layer, expected_layer in zip(got, expected, strict=True):
        for tensor, value in zip(layer[:3], expected_layer[:3], strict=True):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype_of_parameters_and_edit_weights(dtype):
    adapter = make_adapter(dtype=dtype)
    assert {p.dtype for p in adapter.parameters()} == {getattr(torch, dtype)}
    wide = torch.promote_types(getattr(torch, dtype), torch.float32)
    out = adapter.edit_weights()
    assert {tensor.dtype for layer in out for tensor in layer[:3]} == {wide}
    assert adapter.orthonormality_error() < 1e-5


class TestAssign:
    def test_by_hand(self):
        adapter, other = moved(make_adapter()), make_adapter(seed=9)
        values = other.export_state_dict()
        adapter.assign(**values)
        for name, value in adapter.export_state_dict().items():
            torch.testing.assert_close(value, values[name], rtol=1e-5, atol=1e-6)
        assert adapter.free.abs().max() == 0

    @pytest.mark.parametrize(
        ("intervention", "values", "words"),
        [
            (
                "loreft",
                {"weight": torch.zeros(2, RANK, DIM)},
                "weight must have shape (3, 2, 4, 20)",
            ),
            ("loreft", {"bias": torch.zeros(3, 2, 5)}, "bias must have shape (3, 2, 4)"),
            ("loreft", {"rotation": torch.zeros(3, 2, DIM, RANK)}, "rotation must have shape"),
            ("loreft", {"rotation": torch.zeros(3, 2, RANK, DIM)}, "orthonormal rows"),
            ("loreft", {"rotation": torch.full((3, 2, RANK, DIM), math.nan)}, "orthonormal rows"),
            ("consreft", {"weight": torch.zeros(3, 2, RANK, DIM)}, "weight must be None"),
        ],
    )
    def test_what_does_not_fit_changes_nothing(self, intervention, values, words):
        adapter = moved(make_adapter(intervention))
        before = adapter.training_state()
        with pytest.raises(ValueError) as caught:
            adapter.assign(**{"bias": torch.zeros(3, 2, RANK), **values})
        assert words in str(caught.value)
        for name, value in adapter.training_state().items():
            assert torch.equal(value, before[name])

    def test_a_free_rotation_may_be_anything(self):
        adapter = make_adapter("direft")
        adapter.assign(rotation=torch.full((3, 2, RANK, DIM), 2.0))
        assert torch.equal(adapter.edit_weights()[0].decode, torch.full((2, RANK, DIM), 2.0))

    def test_a_rank_above_the_width_is_refused(self):
        with pytest.raises(ValueError, match=r"rank must be at most D = 20.*got 21"):
            make_adapter(rank=21)

    @pytest.mark.parametrize("name", sorted({*ACTIVATIONS, *ALIASES} & {*ACT2FN}))
    def test_every_activation_is_transformers_own(self, name):
        adapter = make_adapter(activation=name)
        u = torch.linspace(-4, 4, 41)
        torch.testing.assert_close(
            activate(adapter.activation, u), ACT2FN[name](u), rtol=0, atol=2e-3
        )


class TestState:
    @pytest.mark.parametrize("intervention", FAMILY)
    def test_export_and_load(self, intervention):
        adapter, other = moved(make_adapter(intervention)), make_adapter(intervention, seed=3)
        other.load(adapter.export_state_dict())
        for weights, expected in zip(other.edit_weights(), adapter.edit_weights(), strict=True):
            torch.testing.assert_close(weights[:3], expected[:3], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("intervention", FAMILY)
    def test_training_is_bit_for_bit(self, intervention):
        adapter, other = moved(make_adapter(intervention)), make_adapter(intervention, seed=3)
        other.load(adapter.training_state(), training_state=True)
        for tensor, expected in zip(
            (*adapter.parameters(), *adapter.buffers()),
            (*other.parameters(), *other.buffers()),
            strict=True,
        ):
            assert torch.equal(tensor, expected)

    def test_names_are_checked(self):
        adapter = make_adapter()
        state = adapter.training_state()
        with pytest.raises(ValueError, match="missing: weight, unknown: none"):
            adapter.load({name: state[name] for name in ("rotation", "bias")})
        with pytest.raises(ValueError, match="missing: none, unknown: extra"):
            adapter.load({**state, "extra": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"missing: rotation.base, rotation.free"):
            adapter.load(adapter.export_state_dict(), training_state=True)
        with pytest.raises(ValueError, match=r"rotation.free must have shape"):
            adapter.load({**state, "rotation.free": torch.zeros(1)}, training_state=True)

    def test_a_gathered_state_is_taken(self):
        adapter, other = moved(make_adapter()), make_adapter(seed=3)
        gathered = {name: value.clone() for name, value in adapter.state_dict().items()}
        for name, value in other.training_state(gathered).items():
            assert torch.equal(value, adapter.training_state()[name])
        del gathered["base"]
        with pytest.raises(RuntimeError, match="state_dict must hold base: every key"):
            other.export_state_dict(gathered)


class TestCache:
    @pytest.fixture
    def adapter(self):
        return make_adapter().eval()

    @torch.no_grad()
    def test_it_is_kept_while_nothing_changes(self, adapter):
        assert adapter.edit_weights() is adapter.edit_weights()

    @torch.no_grad()
    def test_any_write_ends_it(self, adapter):
        for name, tensor in (*adapter.named_parameters(), *adapter.named_buffers()):
            before = adapter.edit_weights()
            tensor.mul_(1.0)
            assert adapter.edit_weights() is not before, name

    @torch.no_grad()
    def test_a_replaced_parameter_ends_it(self, adapter):
        before = adapter.edit_weights()
        adapter.bias.data = torch.zeros_like(adapter.bias)
        assert torch.equal(adapter.edit_weights()[0].bias, torch.zeros(2, RANK))
        assert not torch.equal(before[0].bias, torch.zeros(2, RANK))

    @torch.no_grad()
    def test_writes_past_the_version_end_with_the_mode(self, adapter):
        adapter.edit_weights()
        adapter.bias.data.zero_()
        adapter.train().eval()
        assert torch.equal(adapter.edit_weights()[0].bias, torch.zeros(2, RANK))

    def test_gradients_are_never_cached(self, adapter):
        with torch.no_grad():
            kept = adapter.edit_weights()
        out = adapter.edit_weights()
        assert out is not kept
        assert out[0].decode.requires_grad
        with torch.no_grad():
            assert not adapter.edit_weights()[0].decode.requires_grad

    def test_inference_mode_works(self, adapter):
        with torch.inference_mode():
            first = adapter.edit_weights()
        with torch.no_grad():
            assert torch.equal(adapter.edit_weights()[0].decode, first[0].decode)


class TestLoadedRotation:
    """R as it came from a file is used as it is until it is trained."""

    def trained(self):
        adapter = AdapterParameters(ReftConfig(rank=3), (0, 1), 16)
        with torch.no_grad():
            adapter.free.add_(torch.randn_like(adapter.free))
        return adapter

    def loaded(self, **changes):
        adapter = AdapterParameters(ReftConfig(rank=3, **changes), (0, 1), 16)
        adapter.load(self.stored)
        return adapter.eval().requires_grad_(False)

    @pytest.fixture(autouse=True)
    def _stored(self):
        torch.manual_seed(0)
        self.stored = self.trained().export_state_dict()

    def test_it_is_the_one_on_disk_again_and_again(self):
        adapter = self.loaded()
        for _ in range(3):
            assert torch.equal(adapter.rotation(), self.stored["rotation"])
            state = adapter.export_state_dict()
            assert torch.equal(state["rotation"], self.stored["rotation"])
            assert state["rotation"].data_ptr() != adapter.loaded.data_ptr()
            adapter.load(state)
        again = copy.deepcopy(adapter)
        torch.testing.assert_close(again.rotation(), adapter.rotation())

    @pytest.mark.parametrize(
        "change",
        [
            lambda adapter: adapter.free.add_(0.5),
            lambda adapter: adapter.free.copy_(torch.randn_like(adapter.free)),
            lambda adapter: adapter.reset_parameters(),
            lambda adapter: adapter.load_state_dict(
                AdapterParameters(adapter.config, adapter.layers, 16).state_dict()
            ),
        ],
        ids=["a step", "a copy", "reset", "a state dict"],
    )
    def test_it_is_forgotten_with_what_it_was_made_of(self, change):
        adapter = self.loaded()
        with torch.no_grad():
            change(adapter)
        expected = orthonormalize(adapter.free, adapter.base)
        assert torch.equal(adapter.rotation(), expected)
        assert (adapter.rotation() - self.stored["rotation"]).abs().max() > 1e-2

    def test_what_is_trained_has_a_graph(self):
        adapter = self.loaded().requires_grad_(True)
        adapter.rotation().square().sum().mul(2).sub(adapter.rotation()[..., 0].sum()).backward()
        assert adapter.free.grad.abs().max() > 0
        adapter.train()
        assert adapter.loaded is None

    def test_half_precision_is_made_orthonormal(self):
        self.stored["rotation"] = self.stored["rotation"].bfloat16()
        adapter = self.loaded()
        assert adapter.loaded is None
        assert adapter.orthonormality_error() < 1e-6
