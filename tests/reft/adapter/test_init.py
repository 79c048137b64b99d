"""Initialisation: pyreft's distributions, and the edit that is exactly zero."""

from __future__ import annotations

import math

import pytest
import torch
from random_parameters import DIM, RANK, make_adapter

from reft.adapter.parameters import AdapterParameters
from reft.config import ReftConfig
from reft_kernels.spec import FAMILY


def test_orthonormal_frames_are_uniform():
    adapter = make_adapter(layers=tuple(range(300)), dim=6, rank=2)
    r = adapter.rotation().detach()
    eye = torch.eye(2).expand(300, 2, 2, 2)
    torch.testing.assert_close(r @ r.mT, eye, rtol=0, atol=1e-5)
    # Entries of a uniform frame: mean 0, variance 1/D, either sign on the diagonal.
    assert r.mean().abs() < 0.02
    assert abs(r.var() * 6 - 1) < 0.05
    assert 0.4 < (r.diagonal(dim1=-2, dim2=-1) > 0).float().mean() < 0.6


@pytest.mark.parametrize("intervention", ["loreft", "direft"])
def test_linear_parts_are_drawn_like_nn_linear(intervention):
    adapter = make_adapter(intervention, layers=tuple(range(40)))
    linear = torch.nn.Linear(DIM, RANK * 2000)
    bound = 1 / math.sqrt(DIM)
    for value in (
        adapter.weight,
        adapter.bias,
        *([] if adapter.decode is None else [adapter.decode]),
    ):
        assert value.abs().max() <= bound
        assert abs(value.std() / linear.weight.std() - 1) < 0.05


@pytest.mark.parametrize("intervention", ["consreft", "lobireft"])
def test_a_bias_without_a_weight_is_uniform_in_0_1(intervention):
    bias = make_adapter(intervention, layers=tuple(range(100))).bias
    assert bias.min() >= 0 and bias.max() < 1
    assert abs(bias.mean() - 0.5) < 0.05
    assert abs(bias.var() - 1 / 12) < 0.01


def test_a_generator_decides():
    for name, value in make_adapter(seed=4).export_state_dict().items():
        assert torch.equal(value, make_adapter(seed=4).export_state_dict()[name])
        assert not torch.equal(value, make_adapter(seed=5).export_state_dict()[name])


@pytest.mark.parametrize("intervention", FAMILY)
@pytest.mark.parametrize("activation", [None, "relu", "sigmoid"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_identity_is_exact_or_refused(intervention, activation, dtype):
    impossible = (
        intervention == "consreft"
        or (intervention == "loreft" and (activation or dtype == "bfloat16"))
        # sigmoid(0) is not 0, and relu is flat there: a start that could not learn.
        or (intervention in ("direft_orthonormal", "lobireft") and activation)
    )
    settings = {"activation": activation, "dtype": dtype, "init": "identity"}
    if impossible:
        with pytest.raises(ValueError, match=r"ReftConfig.init.*identity"):
            make_adapter(intervention, **settings)
        return
    out = make_adapter(intervention, **settings).edit_weights()
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


def test_meta_allocates_nothing():
    config = ReftConfig(rank=8)
    adapter = AdapterParameters(config, tuple(range(80)), 8192, device="meta")
    assert all(t.is_meta for t in (*adapter.parameters(), *adapter.buffers()))
