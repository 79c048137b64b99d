"""A state dict is all of an adapter, whoever carried it, and half of one is refused."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny_models import gpt2, llama, moved, tokens
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from reft import ReftConfig, get_reft_model
from reft.adapter.multi_device import MultiDeviceParameters
from reft.adapter.parameters import AdapterParameters
from reft.demo.causal import ASSETS
from reft_kernels import orthonormalize
from reft_kernels.spec import FAMILY

IDS = tokens(2, 7)
LABELS = IDS.masked_fill(torch.arange(7) < 4, -100)
ADAPTER_PREFIX = "reft.adapters.default."
ORTHONORMAL = [name for name, spec in FAMILY.items() if spec.orthonormal]


def wrapped(seed, make=llama, **changes):
    """A model whose adapter is away from its start, as after some training."""
    base = make()
    torch.manual_seed(seed)
    return moved(
        get_reft_model(base, ReftConfig(**{"rank": 3, "positions": "f2+l2", **changes})), 0.2
    )


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(state, expected):
    return state.keys() == expected.keys() and all(
        torch.equal(tensor, expected[key]) for key, tensor in state.items()
    )


def through_safetensors(state, folder):
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "x.safetensors")
    return load_file(folder / "x.safetensors")


def through_torch_save(state, folder):
    file = io.BytesIO()
    torch.save({key: tensor.clone() for key, tensor in state.items()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


CARRIED = {
    "as it came": lambda state, _: state,
    "a dictionary": lambda state, _: dict(state),
    "sorted backwards": lambda state, _: OrderedDict(sorted(state.items(), reverse=True)),
    "copies": lambda state, _: copy.deepcopy(dict(state)),
    "safetensors": through_safetensors,
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("carried", CARRIED.values(), ids=CARRIED)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_any_copy_is_the_same_adapter_in_another_wrapper(make, carried, assign, tmp_path):
    model, other = wrapped(0, make), wrapped(1, make)
    assert not torch.allclose(logits(other), logits(model))
    other.load_state_dict(carried(model.state_dict(), tmp_path), assign=assign)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("member", FAMILY)
def test_every_member_and_every_door(member, tied, tmp_path):
    """The wrapper, the transformers model in it, the adapter alone."""
    model = wrapped(0, intervention=member, tied=tied)
    adapter = model.reft.adapter("default")
    doors = {
        "wrapper": lambda model: model,
        "base": lambda model: model.get_base_model(),
        "adapter": lambda model: model.reft.adapter("default"),
    }
    for strict in (True, False):
        for door in doors.values():
            other = wrapped(1, intervention=member, tied=tied)
            state = through_safetensors(door(model).state_dict(), tmp_path)
            door(other).load_state_dict(state, strict=strict)
            assert torch.equal(logits(other), logits(model))
    alone = {key: tensor for key, tensor in values(model).items() if ".reft." in key}
    other = wrapped(1, intervention=member, tied=tied)
    assert not other.load_state_dict(alone, strict=False).unexpected_keys
    assert torch.equal(logits(other), logits(model))
    numbers = sum(tensor.numel() for tensor in alone.values())
    trained = sum(parameter.numel() for parameter in adapter.parameters())
    assert numbers - trained == (adapter.free.numel() if adapter.free is not None else 0)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("present", ["free", "base"])
@pytest.mark.parametrize("member", ORTHONORMAL)
def test_half_an_r_is_refused_by_name_and_nothing_is_loaded(member, present, strict):
    model, other = wrapped(0, intervention=member), wrapped(1, intervention=member)
    absent = {"free": "base", "base": "free"}[present]
    for door, prefix in (
        (lambda model: model, f"base_model.{ADAPTER_PREFIX}"),
        (lambda model: model.get_base_model(), ADAPTER_PREFIX),
        (lambda model: model.reft.adapter("default"), ""),
    ):
        state = dict(door(model).state_dict())
        del state[prefix + absent]
        before = values(other)
        with pytest.raises(
            RuntimeError, match=f"must hold {prefix}{absent} beside {prefix}{present}"
        ):
            door(other).load_state_dict(state, strict=strict)
        assert same(values(other), before)


def test_what_has_neither_leaves_r_alone():
    model, other = wrapped(0), wrapped(1)
    rotation = other.reft.adapter("default").rotation()
    state = {
        key: tensor for key, tensor in values(model).items() if not key.endswith((".free", ".base"))
    }
    keys = other.load_state_dict(state, strict=False)
    assert {key.rpartition(".")[2] for key in keys.missing_keys} == {"free", "base"}
    adapter = other.reft.adapter("default")
    assert torch.equal(adapter.rotation(), rotation)
    assert torch.equal(adapter.weight, model.reft.adapter("default").weight)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 4}, r"shape \(3, 1, 3, 24\), got \(3, 1, 4, 24\)"),
        ({"layers": [0, 2]}, r"shape \(3, 1, 3, 24\), got \(2, 1, 3, 24\)"),
        ({"tied": False}, r"shape \(3, 1, 3, 24\), got \(3, 2, 3, 24\)"),
        ({"intervention": "direft"}, "it has decode, which this one does not have"),
        ({"intervention": "lobireft", "rank": 4}, r"bias of shape \(3, 1, 3\), got \(3, 1, 4\)"),
    ],
    ids=["rank", "layers", "groups", "member", "member and rank"],
)
def test_another_shape_changes_no_adapter(changes, said):
    """Not even another one, whose part of the dictionary fits."""

    def two(seed, **second):
        model = wrapped(seed)
        model.add_adapter("second", ReftConfig(**{"rank": 3, "positions": "f2+l2", **second}))
        return model

    model, other = two(0, **changes), two(1)
    before = values(other)
    for module, source in ((other, model), (other.get_base_model(), model.get_base_model())):
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=f"(?s)adapters.second.*{said}"):
                module.load_state_dict(dict(source.state_dict()), strict=strict)
            assert same(values(other), before)


def test_a_loaded_rotation_is_forgotten_for_that_of_the_dictionary(tmp_path):
    model, other = wrapped(0), wrapped(1)
    adapter = other.reft.adapter("default")
    adapter.load(adapter.export_state_dict())
    assert adapter.loaded is not None
    adapter.requires_grad_(False)
    other.load_state_dict(through_safetensors(model.state_dict(), tmp_path))
    expected = model.reft.adapter("default")
    assert torch.equal(adapter.rotation(), orthonormalize(expected.free, expected.base))


@pytest.mark.parametrize("factor", [1.0 + 2**-9, 0.75, 3.0])
def test_signs_are_signs_whatever_a_dictionary_went_through(factor):
    model, other = wrapped(0), wrapped(1)
    key = f"base_model.{ADAPTER_PREFIX}base"
    state = values(model)
    state[key].diagonal(dim1=-2, dim2=-1).mul_(factor)
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))


def test_a_dictionary_in_less_precision_keeps_r_orthonormal():
    model, other = wrapped(0), wrapped(1)
    state = {key: tensor.bfloat16() for key, tensor in values(model).items()}
    for assign in (False, True):
        other.load_state_dict(state, assign=assign)
        assert other.reft.adapter("default").base.dtype == torch.float32
        assert other.orthonormality_error() < 1e-5
    assert set(other.reft.adapter("default").export_state_dict()) == {"rotation", "weight", "bias"}


def test_an_adapter_in_parts_is_refused_as_a_whole():
    config = ReftConfig(rank=2)
    devices = [torch.device("cpu"), torch.device("cpu", 0), torch.device("cpu")]
    source, other = (MultiDeviceParameters(config, (0, 1, 2), 8, devices=devices) for _ in range(2))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    for change in (
        lambda state: state.pop("parts.1.base"),
        lambda state: state.update({"parts.1.bias": torch.zeros(2, 1, 2)}),
    ):
        state = dict(source.state_dict())
        change(state)
        with pytest.raises(RuntimeError, match=r"parts\.1\.b.*Nothing was changed"):
            other.load_state_dict(state)
        assert same(dict(other.state_dict()), before)
    other.load_state_dict(dict(source.state_dict()))
    assert torch.equal(other.rotation(), source.rotation())


@pytest.mark.parametrize("member", ["loreft", "consreft", "direft"])
def test_accelerate_saves_and_loads_it(member, tmp_path):
    first, second = (Accelerator(cpu=True) for _ in range(2))
    model = first.prepare(wrapped(0, intervention=member))
    first.save_state(tmp_path)
    other = second.prepare(wrapped(1, intervention=member))
    second.load_state(tmp_path)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_own_trainer_saves_and_resumes_it(tied, tmp_path):
    """Tied weights of the base too, whose state dict would have two keys for one memory."""

    def trainer(seed):
        base = llama(tie_word_embeddings=tied)
        torch.manual_seed(seed)
        model = get_reft_model(base, ReftConfig(rank=3, positions="f2+l2"))
        settings = {"max_steps": 2, "save_steps": 2, "learning_rate": 1e-2, "use_cpu": True}
        quiet = {"report_to": "none", "disable_tqdm": True}
        rows = [{"input_ids": row, "labels": label} for row, label in zip(IDS, LABELS, strict=True)]
        return Trainer(
            model, TrainingArguments(str(tmp_path), **settings, **quiet), train_dataset=rows
        )

    first, second = trainer(0), trainer(1)
    first.train()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    stored = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert {f"base_model.{ADAPTER_PREFIX}{name}" for name in ("free", "base")} < stored.keys()
    for model in (first.model, second.model):
        model.eval()
    assert torch.equal(logits(second.model), logits(first.model))


def test_trl_reward_trainer_resumes_it(word_tokenizer, tmp_path):
    """It saves and loads a wrapper as transformers' own Trainer does, its keys alone."""
    trl = pytest.importorskip("trl")

    def trainer(seed):
        base = LlamaForSequenceClassification(llama(num_labels=1).config)
        torch.manual_seed(seed)
        model = get_reft_model(base, ReftConfig(rank=3, positions="f2+l2", task_type="SEQ_CLS"))
        settings = {"max_steps": 2, "save_steps": 2, "learning_rate": 1e-2, "use_cpu": True}
        quiet = {"report_to": "none", "disable_tqdm": True, "bf16": False}
        pairs = [{"prompt": "red is", "chosen": " warm", "rejected": " cold"}] * 8
        return trl.RewardTrainer(
            model, args=trl.RewardConfig(str(tmp_path), **settings, **quiet),
            train_dataset=Dataset.from_list(pairs), processing_class=word_tokenizer,
        )  # fmt: skip

    first, second = trainer(0), trainer(1)
    first.train()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for model in (first.model, second.model):
        model.eval()
    assert torch.equal(logits(second.model), logits(first.model))


def test_tied_weights_stay_tied():
    base = AutoModelForCausalLM.from_pretrained(ASSETS, dtype="float32")
    model = get_reft_model(base, ReftConfig(rank=2))
    state, held = model.state_dict(), model.state_dict(keep_vars=True)
    ends = [key for key in state if key.endswith(("embed_tokens.weight", "lm_head.weight"))]
    first, second = (state[key] for key in ends)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)
    assert held[ends[0]] is held[ends[1]]
    assert base.lm_head.weight is base.model.embed_tokens.weight


def test_a_start_has_no_gradient_and_counts_as_no_parameter():
    model = wrapped(0)
    adapter = model.reft.adapter("default")
    adapter.requires_grad_(True)
    model(IDS, labels=LABELS).loss.backward()
    assert adapter.free.grad.abs().max() > 0
    assert adapter.base.grad is None and not adapter.base.requires_grad
    named = dict(adapter.named_parameters())
    assert set(named) == {"weight", "bias", "free"}
    assert model.get_nb_trainable_parameters()[0] == sum(
        tensor.numel() for tensor in named.values()
    )


def test_on_meta_it_is_there_and_is_assigned():
    config = ReftConfig(rank=2)
    source = AdapterParameters(config, (0, 1), 8)
    other = AdapterParameters(config, (0, 1), 8, device="meta")
    assert other.state_dict()["base"].is_meta
    other.load_state_dict(dict(source.state_dict()), assign=True)
    assert torch.equal(other.rotation(), source.rotation())
