"""Bases that bitsandbytes holds in 4 or 8 bits are read, never moved, cast or changed."""

from __future__ import annotations

import pytest
import torch
from tiny_models import blocks_of, llama, parameters_of, plain_edits, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from reft import ReftConfig, ReftModel, get_reft_model

bitsandbytes = pytest.importorskip("bitsandbytes")

WIDTH = {"hidden_size": 64, "intermediate_size": 128}
FORMS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
IDS = tokens(3, 9) % 26
LABELS = IDS.clone()
for _row, _n in enumerate((6, 5, 2)):
    LABELS[_row, :_n] = -100
SPANS = [(0, 6), (0, 5), (0, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    llama(**WIDTH).save_pretrained(path)
    return path


@pytest.fixture
def load(folder, monkeypatch):
    """A function that loads the base in a format. Moving or casting that base raises an error."""

    def make(form: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
        settings = dict(FORMS[form])
        if "load_in_4bit" in settings:
            settings["bnb_4bit_compute_dtype"] = dtype
        base = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(**settings),
            dtype=dtype,
            device_map={"": "cpu"},
        )
        for name in ("to", "cpu", "cuda", "float", "half", "bfloat16"):
            monkeypatch.setattr(LlamaForCausalLM, name, _refuse)
        return base

    return make


def _refuse(*args, **kwargs):
    raise AssertionError("a quantised base must not be moved or cast")


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 3, "positions": "f2+l2", "tied": False, **changes})


def contents(base: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Return address and copy of each parameter of the base."""
    return {
        name: (parameter.data_ptr(), parameter.detach().clone())
        for name, parameter in base.named_parameters()
        if ".reft." not in f".{name}"
    }


def plain_copy(base: nn.Module) -> LlamaForCausalLM:
    """Build the base with dequantised matrices."""
    copy = llama(**WIDTH)
    state = {}
    for name, module in base.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(
                weight.data, weight.quant_state
            ).reshape(module.out_features, module.in_features)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            state[f"{name}.weight"] = weight.data.float() * weight.SCB.unsqueeze(1) / 127
        elif isinstance(weight, Tensor):
            state[f"{name}.weight"] = weight.data
    copy.load_state_dict(state)
    return copy


def gradients(model: ReftModel) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=LABELS).loss.backward()
    return {
        n: parameter.grad.clone()
        for n, parameter in model.reft.adapter("default").named_parameters()
    }


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_the_plain_ones_on_the_same_base(load, form):
    model = get_reft_model(load(form), config(layers=[0, 2])).train()
    got, values = gradients(model), parameters_of(model)
    with (
        model.disable_adapter(),
        plain_edits(blocks_of(model.base_model), model.configs["default"], values, SPANS),
    ):
        model(input_ids=IDS, labels=LABELS).loss.backward()
    for name, value in got.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(value, values[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_those_on_the_dequantised_base(load, form):
    base = load(form)
    copied = plain_copy(base)
    model = get_reft_model(base, config()).train()
    plain = get_reft_model(copied, config()).train()
    plain.reft.adapter("default").load(
        model.reft.adapter("default").training_state(), training_state=True
    )
    got, expected = gradients(model), gradients(plain)
    for name, value in got.items():
        assert value.dtype == torch.float32
        # On a CPU bitsandbytes dequantises 8-bit matrices as well before it multiplies.
        assert (value - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_base_from_training_to_loading(load, form, make_trainer, tmp_path):
    base = load(form)
    before = contents(base)
    model = get_reft_model(base, config())
    assert all(parameter.dtype == torch.float32 for parameter in model.reft.parameters())
    trainer = make_trainer(model=model, max_steps=20, save_strategy="steps", save_steps=20)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    assert model.orthonormality_error() < 1e-5
    after = contents(base)
    assert after.keys() == before.keys()
    for name, (place, value) in after.items():
        assert place == before[name][0], name
        assert torch.equal(value, before[name][1]), name

    model.eval()
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(IDS, **settings)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    plain = model.unload()
    with torch.no_grad():
        assert not torch.equal(plain(input_ids=IDS).logits, logits)
    for stored in (tmp_path / "adapter", tmp_path / "run" / "checkpoint-20"):
        again = ReftModel.from_pretrained(plain, stored)
        with torch.no_grad():
            torch.testing.assert_close(again(input_ids=IDS).logits, logits, rtol=2e-3, atol=2e-3)
        assert torch.equal(again.generate(IDS, **settings), expected)
        again.unload()


def test_computing_in_bf16(load):
    model = get_reft_model(load("nf4", torch.bfloat16), config()).train()
    for name, value in gradients(model).items():
        assert value.dtype == torch.float32
        assert value.isfinite().all() and value.abs().max() > 0, name


def test_packed_parameters_are_counted_as_what_they_hold(load):
    model = get_reft_model(load("nf4"), config())
    trained = sum(parameter.numel() for parameter in model.reft.parameters())
    whole = sum(parameter.numel() for parameter in llama(**WIDTH).parameters())
    assert model.get_nb_trainable_parameters() == (trained, whole + trained)


def test_qlora_with_edits(load, make_trainer):
    peft = pytest.importorskip("peft")
    base = load("nf4")
    base = peft.prepare_model_for_kbit_training(
        base, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    model = get_reft_model(wrapped, config())
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = make_trainer(model=model, max_steps=4)
    trainer.train()
    after = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert after.keys() == before.keys()
    assert {"lora" if "lora_" in name else "reft" for name in after} == {"lora", "reft"}
    for name, value in after.items():
        assert not torch.equal(value, before[name]), name
