"""Low precision around the edits: their parameters, gradients and R stay in float32."""

from __future__ import annotations

import pytest
import torch
from tiny_models import bert, blocks_of, gpt2, llama, parameters_of, plain_edits, tokens
from torch import Tensor

from reft import ReftConfig, ReftModel, get_reft_model

IDS = tokens(3, 9)
LABELS = IDS.clone()
for _row, _n in enumerate((6, 5, 2)):
    LABELS[_row, :_n] = -100
BASES = {
    "llama": (llama, LABELS, [(0, 6), (0, 5), (0, 2)]),
    "gpt2": (gpt2, LABELS, [(0, 6), (0, 5), (0, 2)]),
    "bert": (bert, torch.tensor([0, 1, 2]), [(0, 9)] * 3),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 3, "positions": "f2+l2", "tied": False, **changes})


def wrapped(make, how: str, dtype: torch.dtype, **changes) -> ReftModel:
    """The base in float32 for autocast, in the low precision itself otherwise."""
    base = make() if how == "autocast" else make().to(dtype)
    return get_reft_model(base, config(**changes)).train()


def around(how: str, dtype: torch.dtype):
    return torch.autocast("cpu", dtype, enabled=how == "autocast")


def gradients(model: ReftModel, labels: Tensor, how: str, dtype: torch.dtype) -> dict[str, Tensor]:
    model.zero_grad()
    with around(how, dtype):
        loss = model(input_ids=IDS, labels=labels).loss
    loss.backward()
    return {
        n: parameter.grad.clone()
        for n, parameter in model.reft.adapter("default").named_parameters()
    }


def distance(gradients: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> float:
    return float((gradients[name].float() - expected[name]).norm() / expected[name].norm())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("how", ["autocast", "base"])
@pytest.mark.parametrize("intervention", ["loreft", "direft"])
@pytest.mark.parametrize("base", BASES)
def test_gradients_are_as_near_to_float32_as_plain_edits_are(base, intervention, how, dtype):
    make, labels, spans = BASES[base]
    exact = get_reft_model(make(), config(intervention=intervention)).train()
    expected = gradients(exact, labels, "base", torch.float32)

    model = wrapped(make, how, dtype, intervention=intervention)
    model.reft.adapter("default").load(
        exact.reft.adapter("default").training_state(), training_state=True
    )
    got = gradients(model, labels, how, dtype)
    values = parameters_of(model)
    with (
        model.disable_adapter(),
        plain_edits(blocks_of(model.base_model), model.configs["default"], values, spans),
        around(how, dtype),
    ):
        loss = model(input_ids=IDS, labels=labels).loss
    loss.backward()
    plain = {name: values[name].grad for name in got}
    for name, value in got.items():
        assert value.dtype == torch.float32
        # What the same precision does to the same formula, written plainly; and one rounding.
        allowed = 2 * distance(plain, expected, name) + torch.finfo(dtype).eps
        assert allowed < 0.2, name
        assert distance(got, expected, name) <= allowed, name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("how", ["autocast", "base"])
def test_rotations_stay_orthonormal_through_training(how, dtype):
    model = wrapped(llama, how, dtype)
    parameters = list(model.reft.adapter("default").parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with around(how, dtype):
            loss = model(input_ids=IDS, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert model.orthonormality_error() < 1e-5
    state = [value for slot in optimizer.state.values() for value in slot.values()]
    assert {tensor.dtype for tensor in (*parameters, *state)} == {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_in_low_precision_keep_r_orthonormal(dtype):
    model = get_reft_model(llama(), config(dtype=dtype)).train()
    parameters = list(model.reft.adapter("default").parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, eps=1e-4)
    for _ in range(10):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=LABELS).loss.backward()
        assert {parameter.grad.dtype for parameter in parameters} == {DTYPES[dtype]}
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in parameters)
    assert model.orthonormality_error() < 1e-5


@pytest.mark.parametrize("how", ["autocast", "base"])
def test_a_gradient_scaler_scales_unscales_and_skips(how):
    model = wrapped(llama, how, torch.float16)
    expected = gradients(model, LABELS, how, torch.float16)
    parameters = dict(model.reft.adapter("default").named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer.zero_grad()
    with around(how, torch.float16):
        loss = model(input_ids=IDS, labels=LABELS).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for name, parameter in parameters.items():
        assert parameter.grad.isfinite().all()
        # Scaled gradients round elsewhere, and lose less to the small end of float16.
        assert distance({name: parameter.grad}, expected, name) < 0.02, name
    scaler.step(optimizer)
    scaler.update()
    assert not any(torch.equal(parameter, before[name]) for name, parameter in parameters.items())

    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.zero_grad()
    with around(how, torch.float16):
        loss = model(input_ids=IDS, labels=LABELS).loss
    scaler.scale(loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())


@pytest.mark.parametrize("how", ["autocast", "base"])
def test_the_trainer_in_bf16_learns_what_it_learns_in_float32(how, make_trainer, word_llama):
    histories, errors = {}, {}
    for name in ("float32", "bfloat16"):
        base = word_llama.to(torch.bfloat16) if (how, name) == ("base", "bfloat16") else word_llama
        model = get_reft_model(base, config(), generator=torch.Generator().manual_seed(0))
        trainer = make_trainer(
            model=model,
            max_steps=30,
            weight_decay=0.1,
            bf16=how == "autocast" and name == "bfloat16",
        )
        trainer.train()
        histories[name] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        errors[name] = model.orthonormality_error()
        assert {parameter.dtype for parameter in model.reft.parameters()} == {torch.float32}
        model.unload()
    assert max(errors.values()) < 1e-5
    assert histories["bfloat16"][0] == pytest.approx(histories["float32"][0], rel=0.02)
    assert max(histories[name][-1] / histories[name][0] for name in histories) < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES.values()])
def test_a_start_as_identity_is_the_base_bit_for_bit(dtype):
    base = llama().to(dtype)
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
        model = get_reft_model(base, config(init="identity"))
        assert torch.equal(model(input_ids=IDS).logits, expected)
