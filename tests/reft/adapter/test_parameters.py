"""The parameters of an adapter: which exist, how they start, what comes out of them and back in."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers.activations import ACT2FN

from reft.adapter.parameters import AdapterParameters
from reft.config import ReftConfig
from reft_kernels import orthonormalize
from reft_kernels.activations import ACTIVATIONS, ALIASES, activate
from reft_kernels.spec import FAMILY

LAYERS, RANK, DIM = (1, 3, 4), 4, 20

PARAMETERS = {
    "loreft": {"weight", "bias", "free"},
    "direft": {"weight", "bias", "decode"},
    "noreft": {"weight", "bias", "decode"},
    "direft_orthonormal": {"weight", "bias", "free"},
    "consreft": {"bias", "free"},
    "lobireft": {"bias", "free"},
}


def adapter(intervention="loreft", seed=0, dim=DIM, layers=LAYERS, **changes) -> AdapterParameters:
    changes = {"rank": RANK, "positions": "f2+l2", "tied": False, **changes}
    config = ReftConfig(intervention=intervention, **changes)
    return AdapterParameters(config, layers, dim, generator=torch.Generator().manual_seed(seed))


def moved(one: AdapterParameters) -> AdapterParameters:
    """A bank as after some training: every parameter away from where it started."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return one


def test_every_family_row_is_here():
    assert PARAMETERS.keys() == FAMILY.keys()


@pytest.mark.parametrize("intervention", FAMILY)
def test_parameters_of_each_family_row(intervention):
    one = adapter(intervention)
    shapes = {
        "weight": (3, 2, RANK, DIM),
        "bias": (3, 2, RANK),
        "free": (3, 2, DIM, RANK),
        "decode": (3, 2, RANK, DIM),
    }
    found = {name: tuple(p.shape) for name, p in one.named_parameters()}
    assert found == {name: shapes[name] for name in PARAMETERS[intervention]}
    start = {"base"} if "free" in PARAMETERS[intervention] else set()
    assert set(one.state_dict()) == PARAMETERS[intervention] | start


@pytest.mark.parametrize("intervention", FAMILY)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_effective_weights_compute_the_edit(intervention, activation):
    one = moved(adapter(intervention, activation=activation))
    spec = FAMILY[intervention]
    out, r = one(), one.rotation()
    h = torch.randn(7, DIM)
    act = torch.relu if activation else lambda x: x
    for layer in range(3):
        for group in range(2):
            code = one.bias[layer, group].expand(7, -1)
            if one.weight is not None:
                code = code + h @ one.weight[layer, group].T
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


def test_effective_weights_share_no_memory_with_parameters():
    for intervention in FAMILY:
        one = adapter(intervention)
        own = {p.untyped_storage().data_ptr() for p in one.parameters()}
        out = one.edit_weights()
        for part in (tensor for layer in out for tensor in layer[:3] if tensor is not None):
            assert part.untyped_storage().data_ptr() not in own, intervention


def test_low_precision_around_the_bank_does_not_reach_it():
    one = moved(adapter())
    expected = one.edit_weights()
    with torch.autocast("cpu", torch.bfloat16):
        got = one.edit_weights()
    for layer, expected_layer in zip(got, expected, strict=True):
        for tensor, value in zip(layer[:3], expected_layer[:3], strict=True):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype_of_parameters_and_of_what_comes_out(dtype):
    one = adapter(dtype=dtype)
    assert {p.dtype for p in one.parameters()} == {getattr(torch, dtype)}
    wide = torch.promote_types(getattr(torch, dtype), torch.float32)
    out = one.edit_weights()
    assert {tensor.dtype for layer in out for tensor in layer[:3]} == {wide}
    assert one.orthonormality_error() < 1e-5


class TestInit:
    def test_orthonormal_frames_are_uniform(self):
        one = adapter(layers=tuple(range(300)), dim=6, rank=2)
        r = one.rotation().detach()
        eye = torch.eye(2).expand(300, 2, 2, 2)
        torch.testing.assert_close(r @ r.mT, eye, rtol=0, atol=1e-5)
        # Entries of a uniform frame: mean 0, variance 1/D, either sign on the diagonal.
        assert r.mean().abs() < 0.02
        assert abs(r.var() * 6 - 1) < 0.05
        assert 0.4 < (r.diagonal(dim1=-2, dim2=-1) > 0).float().mean() < 0.6

    @pytest.mark.parametrize("intervention", ["loreft", "direft"])
    def test_linear_parts_are_drawn_like_nn_linear(self, intervention):
        one = adapter(intervention, layers=tuple(range(40)))
        linear = torch.nn.Linear(DIM, RANK * 2000)
        bound = 1 / math.sqrt(DIM)
        for value in (one.weight, one.bias, *([] if one.decode is None else [one.decode])):
            assert value.abs().max() <= bound
            assert abs(value.std() / linear.weight.std() - 1) < 0.05

    @pytest.mark.parametrize("intervention", ["consreft", "lobireft"])
    def test_a_bias_without_a_weight_is_uniform_in_0_1(self, intervention):
        bias = adapter(intervention, layers=tuple(range(100))).bias
        assert bias.min() >= 0 and bias.max() < 1
        assert abs(bias.mean() - 0.5) < 0.05
        assert abs(bias.var() - 1 / 12) < 0.01

    def test_a_generator_decides(self):
        for name, value in adapter(seed=4).export_state_dict().items():
            assert torch.equal(value, adapter(seed=4).export_state_dict()[name])
            assert not torch.equal(value, adapter(seed=5).export_state_dict()[name])

    @pytest.mark.parametrize("intervention", FAMILY)
    @pytest.mark.parametrize("activation", [None, "relu", "sigmoid"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_identity_is_exact_or_refused(self, intervention, activation, dtype):
        impossible = (
            intervention == "consreft"
            or (intervention == "loreft" and (activation or dtype == "bfloat16"))
            # sigmoid(0) is not 0, and relu is flat there: a start that could not learn.
            or (intervention in ("direft_orthonormal", "lobireft") and activation)
        )
        settings = {"activation": activation, "dtype": dtype, "init": "identity"}
        if impossible:
            with pytest.raises(ValueError, match=r"ReftConfig.init.*identity"):
                adapter(intervention, **settings)
            return
        out = adapter(intervention, **settings).edit_weights()
        h = torch.randn(9, DIM)
        for layer in range(3):
            weights = out[layer]
            r, code = weights.decode[0], weights.bias[0].expand(9, -1)
            if weights.encode is not None:
                code = code + h @ weights.encode[0].T
            if weights.activation:
                code = getattr(torch, weights.activation)(code)
            if weights.subtract:
                code = code - h @ r.T
            assert torch.equal(code @ r, torch.zeros(9, DIM))

    def test_meta_allocates_nothing(self):
        config = ReftConfig(rank=8)
        one = AdapterParameters(config, tuple(range(80)), 8192, device="meta")
        assert all(t.is_meta for t in (*one.parameters(), *one.buffers()))


class TestAssign:
    def test_by_hand(self):
        one, other = moved(adapter()), adapter(seed=9)
        values = other.export_state_dict()
        one.assign(**values)
        for name, value in one.export_state_dict().items():
            torch.testing.assert_close(value, values[name], rtol=1e-5, atol=1e-6)
        assert one.free.abs().max() == 0

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
        one = moved(adapter(intervention))
        before = one.training_state()
        with pytest.raises(ValueError) as caught:
            one.assign(**{"bias": torch.zeros(3, 2, RANK), **values})
        assert words in str(caught.value)
        for name, value in one.training_state().items():
            assert torch.equal(value, before[name])

    def test_a_free_rotation_may_be_anything(self):
        one = adapter("direft")
        one.assign(rotation=torch.full((3, 2, RANK, DIM), 2.0))
        assert torch.equal(one.edit_weights()[0].decode, torch.full((2, RANK, DIM), 2.0))

    def test_a_rank_above_the_width_is_refused(self):
        with pytest.raises(ValueError, match=r"rank must be at most D = 20.*got 21"):
            adapter(rank=21)

    @pytest.mark.parametrize("name", sorted({*ACTIVATIONS, *ALIASES} & {*ACT2FN}))
    def test_every_activation_is_transformers_own(self, name):
        one = adapter(activation=name)
        u = torch.linspace(-4, 4, 41)
        torch.testing.assert_close(activate(one.activation, u), ACT2FN[name](u), rtol=0, atol=2e-3)


class TestState:
    @pytest.mark.parametrize("intervention", FAMILY)
    def test_published(self, intervention):
        one, other = moved(adapter(intervention)), adapter(intervention, seed=3)
        other.load(one.export_state_dict())
        for weights, expected in zip(other.edit_weights(), one.edit_weights(), strict=True):
            torch.testing.assert_close(weights[:3], expected[:3], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("intervention", FAMILY)
    def test_training_is_bit_for_bit(self, intervention):
        one, other = moved(adapter(intervention)), adapter(intervention, seed=3)
        other.load(one.training_state(), training_state=True)
        for mine, theirs in zip(
            (*one.parameters(), *one.buffers()),
            (*other.parameters(), *other.buffers()),
            strict=True,
        ):
            assert torch.equal(mine, theirs)

    def test_names_are_checked(self):
        one = adapter()
        state = one.training_state()
        with pytest.raises(ValueError, match="missing: weight, unknown: none"):
            one.load({name: state[name] for name in ("rotation", "bias")})
        with pytest.raises(ValueError, match="missing: none, unknown: extra"):
            one.load({**state, "extra": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"missing: rotation.base, rotation.free"):
            one.load(one.export_state_dict(), training_state=True)
        with pytest.raises(ValueError, match=r"rotation.free must have shape"):
            one.load({**state, "rotation.free": torch.zeros(1)}, training_state=True)

    def test_a_gathered_state_is_taken(self):
        one, other = moved(adapter()), adapter(seed=3)
        gathered = {name: value.clone() for name, value in one.state_dict().items()}
        for name, value in other.training_state(gathered).items():
            assert torch.equal(value, one.training_state()[name])
        del gathered["base"]
        with pytest.raises(RuntimeError, match="state_dict must hold base: every key"):
            other.export_state_dict(gathered)


class TestCache:
    @pytest.fixture
    def one(self):
        return adapter().eval()

    @torch.no_grad()
    def test_it_is_kept_while_nothing_changes(self, one):
        assert one.edit_weights() is one.edit_weights()

    @torch.no_grad()
    def test_any_write_ends_it(self, one):
        for name, tensor in (*one.named_parameters(), *one.named_buffers()):
            before = one.edit_weights()
            tensor.mul_(1.0)
            assert one.edit_weights() is not before, name

    @torch.no_grad()
    def test_a_replaced_parameter_ends_it(self, one):
        before = one.edit_weights()
        one.bias.data = torch.zeros_like(one.bias)
        assert torch.equal(one.edit_weights()[0].bias, torch.zeros(2, RANK))
        assert not torch.equal(before[0].bias, torch.zeros(2, RANK))

    @torch.no_grad()
    def test_writes_past_the_version_end_with_the_mode(self, one):
        one.edit_weights()
        one.bias.data.zero_()
        one.train().eval()
        assert torch.equal(one.edit_weights()[0].bias, torch.zeros(2, RANK))

    def test_gradients_are_never_cached(self, one):
        with torch.no_grad():
            kept = one.edit_weights()
        out = one.edit_weights()
        assert out is not kept
        assert out[0].decode.requires_grad
        with torch.no_grad():
            assert not one.edit_weights()[0].decode.requires_grad

    def test_inference_mode_works(self, one):
        with torch.inference_mode():
            first = one.edit_weights()
        with torch.no_grad():
            assert torch.equal(one.edit_weights()[0].decode, first[0].decode)


class TestLoadedRotation:
    """R as it came from a file is used as it is until the bank is trained."""

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
