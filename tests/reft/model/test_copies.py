"""Copies of a wrapped model are independent of it: by copy, pickle and torch.save."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from tiny_models import llama, tokens

from reft import ReftConfig, ReftModel, get_reft_model

IDS = tokens(2, 7)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


HOW = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}
every_way = pytest.mark.parametrize("how", HOW.values(), ids=HOW)
#: torch.save pickles modules, too.
two_ways = pytest.mark.parametrize("how", [HOW["deepcopy"], saved], ids=["deepcopy", "torch.save"])


def wrapped(**changes):
    torch.manual_seed(2)
    return get_reft_model(llama(), ReftConfig(**{"rank": 3, "positions": "f2+l2", **changes}))


@torch.no_grad()
def logits(model, ids=IDS, **more):
    return model(ids, **more).logits


def train(model, steps=2):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def storages(model):
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


@every_way
def test_a_copy_is_trained_and_unloaded_alone(how):
    model = wrapped(modules_to_save=["lm_head"])
    train(model)
    expected, text = logits(model), model.generate(IDS, max_new_tokens=3, do_sample=False)
    twin = how(model)
    assert torch.equal(logits(twin), expected)
    assert torch.equal(twin.generate(IDS, max_new_tokens=3, do_sample=False), text)
    assert not storages(model) & storages(twin)
    train(twin)
    assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)
    base = twin.unload()
    assert not hasattr(base, "reft")
    for module in base.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._load_state_dict_pre_hooks
    assert "save_pretrained" not in vars(base)
    with model.disable_adapter():
        plain = logits(model)
    assert torch.equal(logits(base), plain)
    assert torch.equal(logits(model), expected)


@two_ways
def test_a_copied_base_edits_and_saves_its_own_adapters(how, tmp_path):
    model = wrapped()
    expected = logits(model)
    twin = how(model.base_model)
    assert torch.equal(logits(twin), expected)
    with torch.no_grad():
        model.reft.adapter("default").bias.add_(1.0)
    assert torch.equal(logits(twin), expected)
    assert not torch.equal(logits(model), expected)
    twin.save_pretrained(tmp_path)  # the copy's adapter, not the model's
    assert torch.equal(logits(ReftModel.from_pretrained(llama(), tmp_path)), expected)


@pytest.mark.parametrize("checkpointed", [False, True])
@two_ways
def test_a_copy_continues_training_like_the_model(how, checkpointed):
    model = wrapped()
    if checkpointed:
        model.gradient_checkpointing_enable()
    train(model)
    twin = how(model)
    train(model)
    train(twin)
    assert torch.equal(logits(model), logits(twin))


@two_ways
def test_a_loaded_rotation_is_copied_bit_for_bit(how, tmp_path):
    """Until it is trained, the R of a file is used bit for bit, in a copy too."""
    trained = wrapped()
    train(trained)
    trained.save_pretrained(tmp_path)
    model = ReftModel.from_pretrained(llama(), tmp_path)
    rotation = model.reft.adapter("default").rotation()
    assert torch.equal(how(model).reft.adapter("default").rotation(), rotation)
    assert torch.equal(logits(how(model)), logits(model))


def test_a_shallow_copy_shares_everything_with_the_model():
    model = wrapped()
    expected = logits(model)
    twin = copy.copy(model)
    assert twin.base_model is model.base_model
    assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(copy.copy(model.base_model)), expected)
    train(twin)
    assert torch.equal(logits(twin), logits(model))
    twin.unload()
    with pytest.raises(RuntimeError, match="unloaded"):
        model.set_adapter("default")


@two_ways
def test_a_copy_made_during_a_call_is_not_in_that_call(how):
    """Inside disable_adapter() and inside a generation."""
    model = wrapped()
    expected = logits(model)
    with model.disable_adapter():
        twin = how(model)
    assert torch.equal(logits(twin), expected)

    copies = []

    class Copying:
        def __call__(self, input_ids, scores, **kwargs):
            copies.append(how(model))
            return torch.ones(input_ids.shape[0], dtype=torch.bool)

    model.generate(IDS[:1], max_new_tokens=2, stopping_criteria=[Copying()], do_sample=False)
    assert copies[0].reft.call.generation is None
    assert torch.equal(logits(copies[0]), expected)


def test_a_state_dict_holds_all_of_an_adapter():
    model, other = wrapped(), wrapped()
    train(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    again = get_reft_model(llama(), ReftConfig(rank=3, positions="f2+l2"))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(again), logits(model))


def test_conversions_and_shared_memory():
    model = wrapped()
    expected = logits(model)
    assert torch.equal(logits(model.cpu()), expected)
    assert torch.equal(logits(copy.deepcopy(model).share_memory()), expected)
    assert torch.equal(logits(model.to(torch.float64).to(torch.float32)), expected)
    assert model.half().dtype == torch.float16
    assert model.reft.adapter("default").bias.dtype == torch.float32
    assert logits(model).isfinite().all()
