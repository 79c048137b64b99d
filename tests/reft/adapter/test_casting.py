"""A model that is cast: its adapters keep their precision, are saved, and compute the same."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import bert, llama, moved, tokens
from transformers import TrainingArguments

from reft import ReftConfig, ReftModel, ReftTrainer, get_reft_model, load_pyreft, save_pyreft
from reft.adapter.casting import can_represent
from reft.adapter.multi_device import MultiDeviceParameters
from reft.adapter.parameters import AdapterParameters
from reft_kernels.spec import FAMILY

IDS = tokens(2, 7)
CASTS = {
    "to": lambda model, dtype: model.to(dtype),
    "to of a keyword": lambda model, dtype: model.to(dtype=dtype),
    "to of a device too": lambda model, dtype: model.to("cpu", dtype),
    "to like a tensor": lambda model, dtype: model.to(torch.zeros(1, dtype=dtype)),
    "type": lambda model, dtype: model.type(dtype),
    "its own word": lambda model, dtype: {
        torch.float16: model.half, torch.bfloat16: model.bfloat16,
    }[dtype](),
    "the base alone": lambda model, dtype: (model.get_base_model().to(dtype), model)[1],
}  # fmt: skip
SHORT = [torch.bfloat16, torch.float16]


def wrapped(make=llama, seed=1, **changes):
    base = make()
    torch.manual_seed(seed)
    return moved(
        get_reft_model(base, ReftConfig(**{"rank": 3, "positions": "f2+l2", **changes})), 0.1
    )


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def adapter_of(model):
    return model.reft.adapter("default")


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_keep_the_values_of_an_adapter(cast, dtype):
    model = wrapped()
    before = {name: tensor.clone() for name, tensor in adapter_of(model).training_state().items()}
    same = {id(parameter) for parameter in adapter_of(model).parameters()}
    assert cast(model, dtype) is model
    assert model.get_base_model().lm_head.weight.dtype == dtype
    assert {id(parameter) for parameter in adapter_of(model).parameters()} == same  # an optimizer's
    for name, tensor in adapter_of(model).training_state().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("dtype", [*SHORT, torch.float64])
@pytest.mark.parametrize("member", FAMILY)
def test_a_cast_model_is_saved_and_loaded_again_in_every_way(member, dtype, tmp_path):
    model = wrapped(intervention=member).to(dtype)
    expected = logits(model)
    assert expected.dtype == dtype
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 0.1

    def check(again):
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)

    model.save_pretrained(tmp_path / "published")
    model.save_pretrained(tmp_path / "training", training_state=True)
    model.save_pretrained(tmp_path / "gathered", state_dict=model.state_dict())
    for name in ("published", "training", "gathered"):
        check(ReftModel.from_pretrained(llama().to(dtype), tmp_path / name))
    again = wrapped(intervention=member, seed=2).to(dtype)
    again.restore(tmp_path / "training")
    check(again)
    again = wrapped(intervention=member, seed=2).to(dtype)
    again.load_state_dict(dict(model.state_dict()))
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("dtype", [*SHORT, torch.float64])
def test_pyreft_gets_a_cast_model(dtype, tmp_path):
    model = wrapped()
    save_pyreft(model, tmp_path / "before")
    save_pyreft(model.to(dtype), tmp_path / "after")
    models = [
        load_pyreft(tmp_path / name, llama(), positions="f2+l2") for name in ("before", "after")
    ]
    torch.testing.assert_close(*map(logits, models), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("kept", ["float32", "float64", "bfloat16", "float16"])
def test_an_adapter_keeps_the_dtype_of_its_configuration(kept, dtype):
    dtype = getattr(torch, kept)
    model = wrapped(dtype=kept)
    before = {name: tensor.clone() for name, tensor in adapter_of(model).state_dict().items()}
    model.to(dtype)
    for name, tensor in adapter_of(model).state_dict().items():
        assert tensor.dtype == (
            torch.promote_types(dtype, torch.float32) if name == "base" else dtype
        )
        assert torch.equal(tensor, before[name])
    assert model.orthonormality_error() < 1e-5
    model.to(torch.float64)
    assert adapter_of(model).bias.dtype == torch.float64
    model.to(dtype)
    assert adapter_of(model).bias.dtype == dtype


def test_which_dtype_represents_which():
    order = (torch.float64, torch.float32, torch.bfloat16), (torch.float32, torch.float16)
    for row in order:
        for place, dtype in enumerate(row):
            assert all(can_represent(dtype, other) for other in row[place:])
            assert not any(can_represent(dtype, other) for other in row[:place])
    assert not can_represent(torch.bfloat16, torch.float16) and not can_represent(
        torch.float16, torch.bfloat16
    )


def test_moves_and_copies_are_no_casts():
    """An engine that has cast the parameters itself finds them so after a move."""
    adapter = AdapterParameters(ReftConfig(rank=2), (0, 1), 8)
    for parameter in adapter.parameters():
        parameter.data = parameter.data.bfloat16()
    adapter.to("cpu").to(torch.device("cpu"))
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.bfloat16}
    assert adapter.base.dtype == torch.float32
    assert adapter.orthonormality_error() < 1e-5
    assert adapter.export_state_dict()["rotation"].dtype == torch.float32
    assert adapter.to("meta").is_meta


def test_several_devices_keep_the_dtype_too():
    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    adapter = MultiDeviceParameters(ReftConfig(rank=2), (0, 1), 8, devices=devices)
    before = {name: tensor.clone() for name, tensor in adapter.training_state().items()}
    adapter.half()
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in adapter.training_state().items()
    )


@pytest.mark.parametrize("dtype", SHORT)
def test_a_rotation_that_was_loaded_stays_bit_for_bit(dtype, tmp_path):
    wrapped().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")["rotation"]
    model = ReftModel.from_pretrained(llama(), tmp_path).to(dtype)
    assert torch.equal(adapter_of(model).rotation(), stored)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again/adapter_model.safetensors")["rotation"], stored)


@pytest.mark.parametrize("dtype", SHORT)
def test_modules_to_save_follow_the_base_and_are_saved(dtype, tmp_path):
    model = wrapped(bert, modules_to_save=["classifier"], positions="f2").to(dtype)
    expected = logits(model)
    assert expected.dtype == dtype
    model.save_pretrained(tmp_path)
    again = ReftModel.from_pretrained(bert().to(dtype), tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)


def test_training_goes_on_in_full_precision_after_an_evaluation_in_16_bits(tmp_path):
    labels = IDS.clone()
    labels[:, :4] = -100
    rows = [{"input_ids": row, "labels": label} for row, label in zip(IDS, labels, strict=True)]
    settings = {"max_steps": 2, "save_strategy": "no", "lr_scheduler_type": "constant"}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(
        str(tmp_path), bf16_full_eval=True, learning_rate=1e-3, **settings, **quiet
    )
    model = wrapped()
    trainer = ReftTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    before = {name: tensor.clone() for name, tensor in adapter_of(model).training_state().items()}
    trainer.evaluate()
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    for name, tensor in adapter_of(model).training_state().items():
        assert torch.equal(tensor, before[name])
    trainer.train()
    weight = adapter_of(model).weight
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())
    assert not torch.equal(weight, before["weight"])
