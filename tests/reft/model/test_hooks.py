"""Hooks under activation checkpointing, in both of its kinds and both places where transformers has
put them, under torch.compile, and with dropout."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_models import bert, gpt2, llama, parameters_of, plain_edits, tokens
from torch.utils.checkpoint import checkpoint

from reft import ReftConfig, get_reft_model
from reft.model import edit_hook, hooks
from reft.model.dropout import dropped_edit
from reft_kernels import RowPlan, lowrank_edit
from reft_kernels.spec import EditWeights

IDS = tokens(3, 9)
LABELS = IDS.clone()
for _row, _n in enumerate((6, 5, 2)):
    LABELS[_row, :_n] = -100


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 3, "positions": "f2+l2", "tied": False, **changes})


def gradients(model, ids=IDS, labels=LABELS):
    model.zero_grad()
    model(input_ids=ids, labels=labels).loss.backward()
    adapter = model.base_model.reft.adapter("default")
    return {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("base", [llama, gpt2])
def test_transformers_own_checkpointing(base, reentrant):
    model = get_reft_model(base(), config()).train()
    expected = gradients(model)
    switch_on(model, use_reentrant=reentrant)
    assert_same(gradients(model), expected)


def test_checkpointing_does_not_reach_below_the_first_edit():
    model = get_reft_model(llama(), config(layers=[1])).train()
    recorded = []
    for block in model.base_model.model.layers:
        block.register_forward_hook(lambda m, a, out: recorded.append(out.requires_grad))

    def blocks_recorded():
        recorded.clear()
        gradients(model)
        return recorded[:3]

    switch_on(model)
    assert blocks_recorded() == [False, True, True]
    model.enable_input_require_grads()  # who asks for gradients of the inputs keeps them
    switch_on(model)
    assert blocks_recorded() == [True, True, True]


def switch_on(model, **kwargs):
    """Checkpointing by its name in this transformers, and by the old one, which Trainer may use."""
    enable = getattr(model.base_model, "activation_checkpointing_enable", None)
    if enable is not None:
        model.activation_checkpointing_enable(kwargs or None)
    else:
        model.gradient_checkpointing_enable(kwargs or None)


def checkpoint_with_hooks(base, reentrant: bool) -> None:
    """Checkpoint each block with its hooks inside, as transformers did before 5.23."""
    base.config.use_cache = False  # or the second run would see the keys of the first
    for block in base.model.layers:
        kind = type(block)

        class Checkpointed(kind):
            def __call__(self, *args, **kwargs):
                run = functools.partial(super().__call__, **kwargs)
                return checkpoint(run, *args, use_reentrant=reentrant)

        block.__class__ = Checkpointed


@pytest.mark.parametrize("reentrant", [False, True])
def test_hooks_that_are_run_again(reentrant, monkeypatch):
    model = get_reft_model(llama(), config(layers=[0, 2])).train()
    if reentrant:  # it passes gradients to inputs only, so something below must want them
        model.enable_input_require_grads()
    expected = gradients(model)
    calls = []
    apply_edit = edit_hook.apply_edit

    def counted(*args, **kwargs):
        calls.append(1)
        return apply_edit(*args, **kwargs)

    monkeypatch.setattr(edit_hook, "apply_edit", counted)
    checkpoint_with_hooks(model.base_model, reentrant)
    assert_same(gradients(model), expected)
    assert len(calls) == 4  # two blocks, each in the forward and again in backward


def test_two_forwards_before_one_backward(monkeypatch):
    """The second forward's plan must not leak into the first one's backward."""
    model = get_reft_model(llama(), config()).train()
    other, lengths = tokens(3, 9, seed=50), LABELS.roll(1, 0)

    def both():
        model.zero_grad()
        first = model(input_ids=IDS, labels=LABELS).loss
        second = model(input_ids=other, labels=torch.where(lengths == -100, -100, other)).loss
        (first + 2 * second).backward()
        return {n: p.grad.clone() for n, p in model.reft.adapter("default").named_parameters()}

    expected = both()
    checkpoint_with_hooks(model.base_model, reentrant=False)
    assert_same(both(), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_lost_plan_is_an_error(reentrant, monkeypatch):
    model = get_reft_model(llama(), config()).train()
    model.enable_input_require_grads()
    make = next(
        h for h in model.base_model._forward_pre_hooks.values() if isinstance(h, hooks.MakePlan)
    )
    make.takes_keywords = False  # as of an architecture that hands nothing to its blocks
    expected = gradients(model)
    assert expected["bias"].abs().max() > 0
    checkpoint_with_hooks(model.base_model, reentrant)
    with pytest.raises(RuntimeError, match="runs again in backward"):
        gradients(model)


def test_a_disabled_forward_can_be_run_again():
    model = get_reft_model(llama(), config()).train()
    model.enable_input_require_grads()
    checkpoint_with_hooks(model.base_model, reentrant=False)
    with model.disable_adapter():
        model(input_ids=IDS, labels=LABELS).loss.backward()


def test_the_plan_is_forgotten_after_a_forward():
    model = get_reft_model(llama(), config())
    model(IDS)
    assert model.base_model.reft.call.plan is None
    model.base_model.model.layers[1].register_forward_hook(_raise)
    with pytest.raises(KeyError):
        model(IDS)
    assert model.base_model.reft.call.plan is None


def _raise(*_):
    raise KeyError


def compiled_gradients(model, inputs, **settings):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, **settings)
    model.zero_grad()
    compiled(**inputs).loss.backward()
    adapter = model.base_model.reft.adapter("default")
    return {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}


@pytest.mark.parametrize("base", [llama, bert])
def test_one_graph_under_compile(base):
    """The plan, from the labels, and the edits are part of the graph."""
    model = get_reft_model(base(num_hidden_layers=2), config(layers=[0])).train()
    labels = LABELS if base is llama else torch.tensor([0, 1, 2])
    expected = gradients(model, labels=labels)
    inputs = {"input_ids": IDS, "labels": labels}
    assert_same(compiled_gradients(model, inputs, backend="aot_eager"), expected)


@pytest.mark.slow
def test_inductor_gives_the_same():
    model = get_reft_model(llama(num_hidden_layers=1), config()).train()
    expected = gradients(model)
    got = compiled_gradients(model, {"input_ids": IDS, "labels": LABELS})
    assert_same(got, expected)


class TestDropout:
    def test_it_acts_in_training_only(self):
        model = get_reft_model(llama(), config(dropout=0.5))
        with torch.no_grad():
            expected = model(IDS).logits
            assert torch.equal(model(IDS).logits, expected)
            model.train()
            torch.manual_seed(0)
            first = model(IDS).logits
            assert not torch.equal(first, expected)
            assert not torch.equal(model(IDS).logits, first)
            torch.manual_seed(0)
            assert torch.equal(model(IDS).logits, first)
            model.eval()
            assert torch.equal(model(IDS).logits, expected)

    def test_without_probability_the_path_is_the_operators(self):
        plan, parts = _case()
        torch.testing.assert_close(
            dropped_edit(*parts[:2], EditWeights(*parts[2:]), p=0.0, on="delta", in_place=False),
            lowrank_edit(*parts),
        )
        assert plan is parts[1]

    @pytest.mark.parametrize("on", ["delta", "row"])
    @pytest.mark.parametrize("in_place", [False, True])
    def test_what_is_dropped(self, on, in_place):
        plan, (hidden, _, encode, bias, decode) = _case()
        edited = lowrank_edit(hidden, plan, encode, bias, decode)
        torch.manual_seed(1)
        out = dropped_edit(
            hidden.clone(), plan, EditWeights(encode, bias, decode),
            p=0.5, on=on, in_place=in_place,
        )  # fmt: skip
        rows = [1, 3, 4]
        rest = [row for row in range(6) if row not in rows]
        assert torch.equal(out.view(6, -1)[rest], hidden.view(6, -1)[rest])
        h, y, got = (x.view(6, -1)[rows] for x in (hidden, edited, out))
        kept = h + 2 * (y - h) if on == "delta" else 2 * y
        gone = h if on == "delta" else torch.zeros_like(h)
        is_kept = torch.isclose(got, kept, rtol=1e-4, atol=1e-5)
        is_gone = torch.isclose(got, gone, rtol=1e-4, atol=1e-5)
        assert (is_kept | is_gone).all()
        assert is_kept.any() and is_gone.any()

    @pytest.mark.parametrize("on", ["delta", "row"])
    def test_gradients(self, on):
        plan, (hidden, _, encode, bias, decode) = _case(torch.float64)
        leaves = [x.requires_grad_() for x in (hidden, encode, bias, decode)]

        def run(hidden, encode, bias, decode):
            torch.manual_seed(2)
            return dropped_edit(
                hidden * 1, plan, EditWeights(encode, bias, decode),
                p=0.4, on=on, in_place=True,
            )  # fmt: skip

        assert torch.autograd.gradcheck(run, leaves)

    def test_training_with_it_reaches_every_parameter(self):
        model = get_reft_model(llama(), config(dropout=0.3, dropout_on="row")).train()
        for name, value in gradients(model).items():
            assert value.abs().max() > 0, name


def _case(dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(2, 3, 16, dtype=dtype)
    encode, decode = torch.randn(2, 1, 2, 16, dtype=dtype) * 0.3
    bias = torch.randn(1, 2, dtype=dtype)
    plan = RowPlan.from_rows([4, -1, 1, 3])
    return plan, (hidden, plan, encode, bias, decode)


def test_a_replaced_edit_path_equals_the_plain_one():
    """Out-of-place and in-place edits inside a training step, against hooks written in the test."""
    for in_place in (True, False):
        model = get_reft_model(llama(), config()).train()
        model.base_model.reft.in_place = in_place
        got = gradients(model)
        values = parameters_of(model)
        with (
            model.disable_adapter(),
            plain_edits(
                model.base_model.model.layers,
                model.configs["default"],
                values,
                [(0, 6), (0, 5), (0, 2)],
            ),
        ):
            model(input_ids=IDS, labels=LABELS).loss.backward()
        assert_same(got, {name: values[name].grad for name in got})
