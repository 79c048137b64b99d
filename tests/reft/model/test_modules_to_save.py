"""Modules of the base that an adapter trains in full: copied, activated, saved, removed."""

from __future__ import annotations

import pytest
import torch
from tiny_models import bert, llama, tokens
from torch import nn

from reft import ReftConfig, ReftModel, get_reft_model
from reft.io.adapter_files import read_adapter, write_adapter

IDS = tokens(3, 8)
CLASSES = torch.tensor([0, 1, 2])


def config(**changes) -> ReftConfig:
    return ReftConfig(
        **{"rank": 2, "positions": "f2", "modules_to_save": ["classifier"], **changes}
    )


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def step(model) -> None:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=CLASSES).loss.backward()
        optimizer.step()
    model.eval()


def test_the_copy_is_trained_and_the_original_is_not():
    base = bert()
    original = base.classifier
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = get_reft_model(base, config(task_type="SEQ_CLS"))
    assert base.classifier is not original
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "base_model.classifier.weight",
        "base_model.classifier.bias",
        *(f"base_model.reft.adapters.default.{n}" for n in ("weight", "bias", "free")),
    }
    step(model)
    assert not torch.equal(base.classifier.weight, before["classifier.weight"])
    assert torch.equal(original.weight, before["classifier.weight"])
    back = model.unload()
    assert back.classifier is original
    after = dict(back.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.requires_grad for p in after.values())


def test_disable_adapter_puts_the_original_module_back():
    base = bert()
    expected = logits(base)
    model = get_reft_model(base, config())
    step(model)
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), trained)
    assert not torch.equal(trained, expected)


def test_each_adapter_has_a_copy_of_its_own():
    model = get_reft_model(bert(), config(), "first")
    step(model)
    first = logits(model)
    model.add_adapter("second", config())
    model.add_adapter("plain", config(modules_to_save=None))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    fresh = model.base_model.classifier
    # A new adapter starts from the base's module, not from the trained one.
    assert torch.equal(fresh.weight, bert().classifier.weight)
    step(model)
    second = logits(model)
    model.set_adapter("plain")
    assert torch.equal(model.base_model.classifier.weight, bert().classifier.weight)
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    assert not any(p.requires_grad for p in fresh.parameters())
    model.delete_adapter("first")
    assert model.active_adapter == "second"
    assert torch.equal(logits(model), second)
    with model.disable_adapter():
        model.set_adapter("plain")
        assert torch.equal(model.base_model.classifier.weight, bert().classifier.weight)
    with pytest.raises(ValueError, match=r"cannot mix adapters.*'second' does"):
        model(IDS, adapter_names=["second", "plain", "plain"])
    assert model(IDS, adapter_names=["plain"] * 3).logits.shape == (3, 3)


def test_the_copy_is_saved_with_the_adapter(tmp_path):
    model = get_reft_model(bert(), config(task_type="SEQ_CLS"))
    step(model)
    model.save_pretrained(tmp_path / "a", training_state=True)
    again = ReftModel.from_pretrained(bert(), tmp_path / "a")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    assert torch.equal(again.base_model.classifier.weight, model.base_model.classifier.weight)
    assert not any(p.requires_grad for p in again.parameters())
    step(model)
    moved = logits(model)
    model.restore(tmp_path / "a")
    assert not torch.equal(logits(model), moved)
    assert torch.equal(again.base_model.classifier.weight, model.base_model.classifier.weight)


def test_gathered_parameters_are_saved(tmp_path):
    model = get_reft_model(bert(), config())
    step(model)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "wrapper", state_dict=state)
    inner = {name.removeprefix("base_model."): value for name, value in state.items()}
    model.save_pretrained(tmp_path / "base", state_dict=inner)
    for folder in ("wrapper", "base"):
        again = ReftModel.from_pretrained(bert(), tmp_path / folder)
        assert torch.equal(
            again.base_model.classifier.weight, model.base_model.classifier.weight + 1
        )
        bias = model.reft.adapter("default").bias
        assert torch.equal(again.reft.adapter("default").bias, bias + 1)
    with pytest.raises(ValueError, match=r"state_dict must hold .*reft\.adapters\.default"):
        model.save_pretrained(tmp_path / "none", state_dict={})


def test_stored_modules_that_do_not_fit_are_refused(tmp_path):
    model = get_reft_model(bert(), config())
    model.save_pretrained(tmp_path)
    other = bert()
    other.classifier = nn.Linear(24, 5)
    with pytest.raises(ValueError, match=r"classifier\.(weight|bias) must have shape \(5"):
        ReftModel.from_pretrained(other, tmp_path)
    assert not hasattr(other, "reft")
    stored, tensors = read_adapter(tmp_path)
    del tensors["heads.classifier.bias"]
    write_adapter(tmp_path, stored, tensors)
    with pytest.raises(ValueError, match=r"missing: classifier\.bias, unknown: none"):
        ReftModel.from_pretrained(bert(), tmp_path)


def test_unknown_modules_are_refused():
    base = bert()
    with pytest.raises(ValueError, match=r"modules_to_save.*'clasifier'"):
        get_reft_model(base, config(modules_to_save=["clasifier"]))
    assert not hasattr(base, "reft")


def test_an_output_layer_can_be_trained():
    base = llama(tie_word_embeddings=False)
    model = get_reft_model(base, config(modules_to_save=["lm_head"])).train()
    labels = IDS.clone()
    labels[:, :4] = -100
    model(input_ids=IDS, labels=labels).loss.backward()
    assert model.base_model.lm_head.weight.grad.abs().max() > 0
    assert model.base_model.model.norm.weight.grad is None


def test_a_part_of_an_edited_block_may_be_trained_in_full():
    """The block's output is edited, whatever computes it."""
    model = get_reft_model(llama(), ReftConfig(rank=2, modules_to_save=["layers.1.mlp"])).train()
    ids = tokens(1, 6)
    model(ids, labels=ids, prompt_lengths=[4]).loss.backward()
    model.eval()
    with torch.no_grad():
        edited = model(ids).logits
        with model.disable_adapter():
            assert not torch.equal(model(ids).logits, edited)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules_to_save": ["model"]}, "model contains the block_output of block 0"),
        (
            {"layers": [1], "modules_to_save": ["model.layers.1"]},
            "model.layers.1 contains the block_output of block 1",
        ),
        (
            {"layers": [2], "component": "mlp_output", "modules_to_save": ["layers.2.mlp"]},
            "layers.2.mlp contains the mlp_output of block 2",
        ),
    ],
)
def test_edited_modules_cannot_be_trained_in_full(changes, message):
    """The copy would not be edited."""
    base = llama()
    before = dict(base.named_modules())
    with pytest.raises(ValueError, match=message):
        get_reft_model(base, ReftConfig(rank=2, **changes))
    assert dict(base.named_modules()) == before
