"""Optimizers see ordinary parameters, and R stays orthonormal whatever they do."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny_models import bert, gpt2, llama, tokens
from torch import nn
from torch.nn.utils import parametrize

from reft import ReftConfig, ReftModel, get_reft_model
from reft.adapter.init import why_not_identity
from reft_kernels.spec import FAMILY

IDS = tokens(4, 9)
LABELS = IDS.clone()
for _row, _n in enumerate((6, 5, 2, 4)):
    LABELS[_row, :_n] = -100


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 3, "positions": "f2+l2", "tied": False, **changes})


def made(base=llama, seed: int = 0, **changes) -> ReftModel:
    generator = torch.Generator().manual_seed(seed)
    return get_reft_model(base(), config(**changes), generator=generator).train()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trained(model).items()}


def _eight_bit(name: str, **settings):
    def make(parameters):
        bitsandbytes = pytest.importorskip("bitsandbytes")
        # Below its default threshold bitsandbytes keeps parameters in 32 bits.
        return getattr(bitsandbytes.optim, name)(parameters, min_8bit_size=16, **settings)

    return make


DECAY = {"lr": 2e-2, "weight_decay": 0.1}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, foreach=False, **DECAY),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, foreach=True, **DECAY),
    "adamw-fused": lambda p: torch.optim.AdamW(p, fused=True, **DECAY),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "adafactor-transformers": lambda p: transformers.Adafactor(
        p, lr=2e-2, relative_step=False, scale_parameter=False, weight_decay=0.1
    ),
    "adam8bit": _eight_bit("Adam8bit", **DECAY),
    "adamw8bit": _eight_bit("AdamW8bit", **DECAY),
    "lion8bit": _eight_bit("Lion8bit", lr=5e-3, weight_decay=0.1),
}


def steps(model: ReftModel, optimizer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("intervention", FAMILY)
def test_parameters_are_ordinary(intervention):
    model = made(intervention=intervention)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    parameters = trained(model)
    assert len({id(value) for value in parameters.values()}) == len(parameters)
    for name, value in parameters.items():
        assert type(value) is nn.Parameter, name
        assert value.is_leaf and value.is_contiguous() and value.dtype == torch.float32
        assert value is model.get_parameter(name)
        assert name in model.state_dict()
    assert {*map(id, parameters.values())} <= {*map(id, model.parameters())}


@pytest.mark.parametrize(
    ("name", "intervention"),
    [*((name, "loreft") for name in OPTIMIZERS), ("adamw", "direft"), ("adamw8bit", "direft")],
)
def test_every_optimizer_trains(name, intervention):
    model = made(intervention=intervention)
    start = values(model)
    result = steps(model, OPTIMIZERS[name](list(trained(model).values())), 15)
    assert result[-1] < 0.9 * result[0]
    for key, parameter in trained(model).items():
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, start[key]), key
    assert model.orthonormality_error() < 1e-5


def test_the_three_implementations_of_adamw_agree():
    results = []
    for name in ("adamw", "adamw-foreach", "adamw-fused"):
        model = made()
        steps(model, OPTIMIZERS[name](list(trained(model).values())), 5)
        results.append(values(model))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


def test_closures_that_run_the_model_several_times():
    model = made()
    optimizer = torch.optim.LBFGS(trained(model).values(), lr=0.5, max_iter=5)
    calls, losses = [], []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=LABELS).loss
        loss.backward()
        return loss

    for _ in range(3):
        losses.append(float(optimizer.step(closure)))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    assert len(calls) > 3
    assert model.orthonormality_error() < 1e-5


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
@pytest.mark.parametrize("intervention", [name for name, row in FAMILY.items() if row.orthonormal])
def test_r_survives_a_decay_that_clears_every_parameter(kind, intervention):
    """If R itself or a triangle of it were the parameter, this decay would leave the
    zero matrix."""
    model = made(intervention=intervention)
    optimizer = getattr(torch.optim, kind)(trained(model).values(), lr=0.5, weight_decay=2.0)
    for _ in range(3):
        before = model.reft.adapter("default").rotation().detach().clone()
        steps(model, optimizer, 1)
        after = model.reft.adapter("default").rotation().detach()
        assert model.orthonormality_error() < 1e-5
        lengths = torch.linalg.vector_norm(after, dim=-1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-4, atol=1e-5)
        assert not torch.equal(before, after)


def test_accumulated_gradients_are_those_of_the_large_batch():
    model = made()
    model(input_ids=IDS, labels=LABELS).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in trained(model).items()}
    counted = (LABELS[:, 1:] != -100).sum()
    for order in ("backward after each", "one backward at the end"):
        model.zero_grad()
        losses = []
        for rows in (slice(0, 1), slice(1, 4)):
            share = (LABELS[rows, 1:] != -100).sum() / counted
            losses.append(share * model(input_ids=IDS[rows], labels=LABELS[rows]).loss)
            if order == "backward after each":
                losses.pop().backward()
        if losses:
            sum(losses).backward()
        for name, value in trained(model).items():
            torch.testing.assert_close(value.grad, expected[name], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ state dicts


@pytest.mark.parametrize("intervention", FAMILY)
def test_a_state_dict_fits_another_wrapper(intervention, tmp_path):
    model = made(intervention=intervention)
    steps(model, torch.optim.AdamW(trained(model).values(), lr=1e-2), 3)
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    torch.save(model.state_dict(), tmp_path / "state.pt")
    ways = {
        "itself": model.state_dict(),
        "copied": copy.deepcopy(model.state_dict()),
        "from a file": torch.load(tmp_path / "state.pt", weights_only=True),
    }
    for way, state in ways.items():
        other = made(seed=1, intervention=intervention).eval()
        with torch.no_grad():
            assert not torch.equal(other(input_ids=IDS).logits, expected)
            assert not any(other.load_state_dict(state))
            assert torch.equal(other(input_ids=IDS).logits, expected), way


def test_a_state_dict_brings_the_same_wrapper_back():
    model = made()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    steps(model, optimizer, 2)
    saved_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())
    first = steps(model, optimizer, 3)
    model.load_state_dict(saved_state)
    optimizer.load_state_dict(state)
    assert steps(model, optimizer, 3) == first


# ------------------------------------------------------------------ identity initialisation


@pytest.mark.parametrize(
    ("intervention", "activation"),
    [*((name, given) for name in FAMILY for given in (None, "relu")), ("loreft", "tanh")],
)
def test_a_start_as_identity_learns(intervention, activation, make_trainer, word_llama):
    settings = {"intervention": intervention, "activation": activation, "init": "identity"}
    if why_not_identity(FAMILY[intervention], activation, torch.float32):
        with pytest.raises(ValueError, match=r"ReftConfig.init.*identity"):
            get_reft_model(word_llama, config(**settings))
        return
    ids = IDS % word_llama.config.vocab_size
    with torch.no_grad():
        expected = word_llama(input_ids=ids).logits
    model = get_reft_model(word_llama, config(**settings))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
    trainer = make_trainer(model=model, max_steps=20)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[0]["grad_norm"] > 1e-4
    assert sum(row["loss"] for row in rows[-3:]) / 3 < 0.95 * rows[0]["loss"]
    assert model.orthonormality_error() < 1e-5


# ------------------------------------------------------------------ activation checkpointing

RECORDS = [{"text": text, "label": label} for label, text in enumerate(("a one", "b two", "c no"))]


def _lora(base: nn.Module, targets: list[str]) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    settings = {"r": 2, "target_modules": targets, "init_lora_weights": False}
    return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


CHECKPOINTED = {
    "gpt2": lambda: gpt2(),
    "bert": lambda: bert(),
    "llama-lora": lambda: _lora(llama(), ["q_proj", "v_proj"]),
    "gpt2-lora": lambda: _lora(gpt2(), ["c_attn"]),
}


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
@pytest.mark.parametrize(
    ("name", "reentrant"),
    [
        *(("gpt2", False), ("gpt2", True), ("bert", False)),
        *(("llama-lora", False), ("llama-lora", True), ("gpt2-lora", True)),
    ],
)
def test_checkpointing_with_accumulation_trains_the_same(name, reentrant, make_trainer):
    results = []
    for checkpointing in (False, True):
        generator = torch.Generator().manual_seed(0)
        model = get_reft_model(CHECKPOINTED[name](), config(), generator=generator)
        start = values(model)
        trainer = make_trainer(
            model=model,
            data=RECORDS * 4 if name == "bert" else None,
            max_steps=2,
            optim="sgd",
            max_grad_norm=0.0,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None,
        )
        trainer.train()
        after = values(model)
        assert not any(torch.equal(start[key], after[key]) for key in start)
        assert any("lora_" in key for key in start) == name.endswith("lora")
        results.append((after, [r["loss"] for r in trainer.state.log_history if "loss" in r]))
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)
    for key, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["bert", *(n for n in CHECKPOINTED if n.endswith("lora"))])
def test_two_checkpointed_forwards_before_one_backward(name, reentrant):
    model = get_reft_model(CHECKPOINTED[name](), config()).train()
    other = tokens(4, 9, seed=50)
    if name == "bert":
        labels = (torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 1, 0]))
    else:
        labels = (LABELS, torch.where(LABELS.roll(1, 0) == -100, -100, other))

    def both():
        model.zero_grad()
        first = model(input_ids=IDS, labels=labels[0]).loss
        second = model(input_ids=other, labels=labels[1]).loss
        (first + 2 * second).backward()
        return {key: parameter.grad.clone() for key, parameter in trained(model).items()}

    expected = both()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for key, value in both().items():
        assert value.abs().max() > 0, key
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
