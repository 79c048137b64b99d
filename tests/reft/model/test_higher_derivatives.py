"""Higher derivatives of a wrapped model against finite differences: gradient penalties, Hessians,
forward-mode derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import gpt2, padded
from torch.autograd import forward_ad

from reft import ReftConfig, ReftModel, get_reft_model

STEP = 1e-5

ADAPTERS = {
    "loreft": {},
    "untied": {"tied": False},
    "direft": {"intervention": "direft", "positions": "prompt"},
    "bent": {"intervention": "noreft", "activation": "gelu"},
    "no W": {"intervention": "consreft"},
    "b alone": {"intervention": "lobireft"},
    "dropout": {"dropout": 0.3},
}


def wrapped(**fields) -> ReftModel:
    """A GPT-2 in float64, whose norms keep that precision, with R away from its base point."""
    base = gpt2().double()
    base.set_attn_implementation("eager")  # other implementations have first derivatives only
    fields = {"positions": "f1+l2", "rank": 2, "dtype": "float64", **fields}
    model = get_reft_model(base, ReftConfig(**fields))
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random).double())
    return model.train("dropout" in fields)


def trained(model):
    return [each for each in model.parameters() if each.requires_grad]


def loss_of(model, inputs, embeddings):
    ids, mask, _ = inputs
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    torch.manual_seed(7)  # the same entries are dropped in every forward
    logits = model(inputs_embeds=embeddings, attention_mask=mask, labels=labels).logits
    # The model's own loss is float32.
    return torch.nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:])


@pytest.fixture
def inputs():
    return padded([6, 8], "right")


def moved(parameters, directions, factor):
    with torch.no_grad():
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.add_(direction, alpha=factor)


def slope(value, parameters, directions):
    """The derivative of ``value`` along the directions, by central differences."""
    moved(parameters, directions, STEP)
    above = value()
    moved(parameters, directions, -2 * STEP)
    below = value()
    moved(parameters, directions, STEP)
    return [(a - b) / (2 * STEP) for a, b in zip(above, below, strict=True)]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_gradient_penalty_and_a_hessian_times_a_vector(kind, inputs):
    model = wrapped(**ADAPTERS[kind])
    parameters = trained(model)
    random = torch.Generator().manual_seed(5)
    directions = [torch.randn(each.shape, generator=random).double() for each in parameters]
    start = model.get_input_embeddings()(inputs[0]).detach()

    def penalty(create_graph=False):
        """The squared gradient of the loss by the embeddings."""
        embeddings = start.clone().requires_grad_()
        loss = loss_of(model, inputs, embeddings)
        return torch.autograd.grad(loss, embeddings, create_graph=create_graph)[0].square().sum()

    def gradients(create_graph=False):
        loss = loss_of(model, inputs, start)
        return torch.autograd.grad(loss, parameters, create_graph=create_graph)

    grads = torch.autograd.grad(penalty(create_graph=True), parameters)
    derivative = sum((g * v).sum() for g, v in zip(grads, directions, strict=True))
    (expected,) = slope(lambda: [penalty()], parameters, directions)
    assert abs(expected) > 1e-4
    torch.testing.assert_close(derivative, expected, rtol=1e-5, atol=1e-8)

    along = sum((g * v).sum() for g, v in zip(gradients(True), directions, strict=True))
    product = torch.autograd.grad(along, parameters)
    for actual, expected in zip(product, slope(gradients, parameters, directions), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backward", [False, True], ids=["grad", ".backward()"])
def test_a_penalty_trains(backward, inputs):
    """Along the gradient of the penalty, the penalty decreases by the predicted amount."""
    model = wrapped()
    parameters = trained(model)
    start = model.get_input_embeddings()(inputs[0]).detach()

    def penalty(create_graph):
        embeddings = start.clone().requires_grad_()
        loss = loss_of(model, inputs, embeddings)
        return torch.autograd.grad(loss, embeddings, create_graph=create_graph)[0].square().sum()

    before = penalty(True)
    if backward:
        before.backward()
        grads = [each.grad for each in parameters]
    else:
        grads = torch.autograd.grad(before, parameters)
    size = sum(each.square().sum() for each in grads)
    moved(parameters, grads, -1e-4)
    change = float(penalty(False) - before.detach())
    torch.testing.assert_close(change, float(-1e-4 * size), rtol=0.05, atol=0)


@pytest.mark.parametrize("start", ["trained", "loaded"])
@pytest.mark.parametrize("kind", ["loreft", "bent"])
def test_tangents_are_seen_despite_cached_weights(kind, start, inputs, tmp_path):
    """In eval mode without gradients, R and A are cached between forwards, and a loaded R is used
    as it was loaded. A tangent of a parameter must be seen all the same."""
    model = wrapped(**ADAPTERS[kind])
    if start == "loaded":
        model.save_pretrained(tmp_path)
        base = copy.deepcopy(model).unload()
        model = ReftModel.from_pretrained(base, tmp_path).eval()
    ids, mask, _ = inputs
    state = {name: each.detach() for name, each in model.named_parameters() if "reft" in name}
    assert state
    random = torch.Generator().manual_seed(6)
    tangents = {k: torch.randn(v.shape, generator=random).to(v) for k, v in state.items()}

    def logits(values):
        kwargs = {"input_ids": ids, "attention_mask": mask}
        return torch.func.functional_call(model, values, kwargs=kwargs).logits[mask > 0]

    with torch.no_grad():
        above, below = (
            logits({k: v + step * tangents[k] for k, v in state.items()}) for step in (STEP, -STEP)
        )
        expected = (above - below) / (2 * STEP)
        logits(state)  # the cached weights are computed from these very tensors
        with forward_ad.dual_level():
            duals = {k: forward_ad.make_dual(v, tangents[k]) for k, v in state.items()}
            tangent = forward_ad.unpack_dual(logits(duals)).tangent
        _, by_transform = torch.func.jvp(logits, (state,), (tangents,))
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(by_transform, expected, rtol=1e-4, atol=1e-6)
