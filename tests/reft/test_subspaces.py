"""Subspaces against pyreft's formula of the composition, written out."""

from __future__ import annotations

import pytest
import torch
from tiny_models import LAYERS, blocks_of, llama, padded, parameters_of

from reft import ReftConfig, ReftDataCollator, ReftModel, get_reft_model, save_pyreft

PARTS = {"german": [0, 1], "polite": [2, 3, 4]}
ALL = range(5)


def make(activation=None, intervention="loreft", positions="f1+l1", **more) -> ReftModel:
    config = ReftConfig(
        intervention=intervention, rank=5, positions=positions, subspaces=PARTS,
        activation=activation, **more,
    )  # fmt: skip
    torch.manual_seed(7)
    model = get_reft_model(llama(), config)
    with torch.no_grad():
        for parameter in model.base_model.reft.adapter("default").parameters():
            parameter.normal_(std=0.5)
    return model.eval()


def plain_logits(values, config, ids, mask, parts, lengths):
    """Compute logits with pyreft's SubloreftIntervention: the columns of the subspace in the
    difference, times the rows of R for the subspace."""
    base = llama()
    width, act = ids.shape[1], getattr(torch, config.activation or "clone")

    def hook(layer):
        def run(module, args, output):
            out = (output[0] if isinstance(output, tuple) else output).clone()
            rotation = values["rotation"][layer, 0]
            for row, (n, part) in enumerate(zip(lengths, parts, strict=True)):
                rows = torch.tensor(part)
                for token in {0, n - 1} if n > 1 else set():
                    place = width - n + token
                    h = out[row, place].clone()
                    code = values["bias"][layer, 0]
                    if values["weight"] is not None:
                        code = code + values["weight"][layer, 0] @ h
                    diff = act(code) - (rotation @ h if config.spec.subtract else 0)
                    out[row, place] = h + diff[rows] @ rotation[rows]
            return (out, *output[1:]) if isinstance(output, tuple) else out

        return run

    for layer, block in enumerate(blocks_of(base)):
        block.register_forward_hook(hook(layer))
    return base(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    "intervention", ["loreft", "direft", "noreft", "consreft", "lobireft", "direft_orthonormal"]
)
def test_a_mixed_batch_is_the_formula(intervention, activation):
    lengths = [6, 3, 5, 8]
    ids, mask, _ = padded(lengths, "left")
    model = make(activation, intervention)
    config, values = model.configs["default"], parameters_of(model)
    names = ["german", ["polite"], None, ["german", "polite"]]
    parts = [PARTS["german"], PARTS["polite"], ALL, ALL]
    ours = model(input_ids=ids, attention_mask=mask, subspaces=names).logits
    theirs = plain_logits(values, config, ids, mask, parts, lengths)
    kept = mask.bool()
    torch.testing.assert_close(ours[kept], theirs[kept], rtol=1e-4, atol=1e-4)
    ours[kept].square().sum().backward()
    theirs[kept].square().sum().backward()
    for name, parameter in model.base_model.reft.adapter("default").named_parameters():
        wanted = values[name].grad
        error = (parameter.grad - wanted).norm() / wanted.norm()
        assert error < 1e-4, name


def test_one_part_leaves_the_other_untrained():
    ids, _, _ = padded([6], "left")
    model = make()
    model(ids, subspaces="german").logits.square().sum().backward()
    adapter = model.base_model.reft.adapter("default")
    for parameter in (adapter.weight, adapter.bias):
        assert parameter.grad[:, :, PARTS["german"]].abs().min() > 0
        assert not parameter.grad[:, :, PARTS["polite"]].any()


def test_the_parts_together_are_the_whole():
    ids, _, _ = padded([6], "left")
    model = make()
    with torch.no_grad():
        whole = model(ids).logits
        assert torch.equal(model(ids, subspaces=[["german", "polite"]]).logits, whole)
        assert torch.equal(model(ids, subspaces=[None]).logits, whole)
        assert not torch.equal(model(ids, subspaces="german").logits, whole)


def test_beside_other_adapters():
    ids, _, singles = padded([6, 6, 6, 6], "left")
    model = make()
    model.add_adapter("other", ReftConfig(rank=3, positions="l2", init="pyreft"))
    names = ["default", "__base__", "other", "default"]
    parts = ["german", None, None, "polite"]
    with torch.no_grad():
        both = model(ids, adapter_names=names, subspaces=parts).logits
        for row, single in enumerate(singles):
            alone = model(single, adapter_names=[names[row]], subspaces=[parts[row]]).logits
            torch.testing.assert_close(both[row], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation(beams):
    ids, mask, singles = padded([4, 9], "left")
    model = make()
    how = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    both = model.generate(input_ids=ids, attention_mask=mask, subspaces=["german", "polite"], **how)
    for row, (single, part) in enumerate(zip(singles, PARTS, strict=True)):
        alone = model.generate(
            input_ids=single, attention_mask=torch.ones_like(single), subspaces=part, **how
        )
        length = alone.shape[1] - single.shape[1]
        assert both[row, ids.shape[1] :][:length].tolist() == alone[0, single.shape[1] :].tolist()


def test_checkpointing_uses_the_parts_of_its_own_forward():
    ids, _, _ = padded([6, 6], "left")

    def gradients(checkpointing: bool):
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        first = model(ids, subspaces=["german", "polite"]).logits.square().sum()
        second = model(ids, subspaces=["polite", "polite"]).logits.square().sum()
        (first + second).backward()
        adapter = model.base_model.reft.adapter("default")
        return {name: parameter.grad for name, parameter in adapter.named_parameters()}

    plain, again = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded(tmp_path):
    ids, _, _ = padded([7], "left")
    model = make()
    model.save_pretrained(tmp_path)
    again = ReftModel.from_pretrained(llama(), tmp_path).eval()
    assert again.configs["default"].to_dict()["subspaces"] == PARTS
    for part in PARTS:
        assert torch.equal(again(ids, subspaces=part).logits, model(ids, subspaces=part).logits)


def test_records_name_their_part(word_tokenizer, make_trainer, color_records):
    collator = ReftDataCollator(word_tokenizer)
    records = [{**record, "subspaces": "german"} for record in color_records[:3]]
    assert collator(records)["subspaces"] == ["german"] * 3

    config = ReftConfig(rank=5, positions="f1+l1", subspaces=PARTS)
    data = [
        {**record, "subspaces": "german" if number % 2 else ["german"]}
        for number, record in enumerate(color_records)
    ]
    trainer = make_trainer(config=config, data=data)
    adapter = trainer.model.base_model.reft.adapter("default")
    before = adapter.weight.detach().clone()
    trainer.train()
    moved = (adapter.weight.detach() - before).abs().amax(dim=(0, 1, 3))
    assert (moved[PARTS["german"]] > 0).all()
    assert not moved[PARTS["polite"]].any()


def test_rows_stay_orthonormal_together():
    model = make()
    rotation = parameters_of(model)["rotation"]
    gram = rotation @ rotation.transpose(-1, -2)
    torch.testing.assert_close(gram, torch.eye(5).expand(LAYERS, 1, 5, 5), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("french", r"'default' has 'german', 'polite', got 'french'"),
        (["german"], r"for each of the 2; got \['german'\]"),
        ([3, 4], r"for each of the 2; got \[3, 4\]"),
        ([["german", "french"], None], r"got 'french'"),
    ],
)
def test_mistakes(value, match):
    ids, _, _ = padded([6, 6], "left")
    with pytest.raises(ValueError, match=match):
        make()(ids, subspaces=value)


def test_adapters_without_parts(tmp_path):
    ids, _, _ = padded([6, 6], "left")
    model = get_reft_model(llama(), ReftConfig(rank=2))
    with pytest.raises(ValueError, match=r"'default' has none, got 'german'"):
        model(ids, subspaces="german")
    with pytest.raises(ValueError, match=r"'__base__' has none, got 'german'"):
        make()(ids, adapter_names=["default", "__base__"], subspaces="german")
    with pytest.raises(
        ValueError, match=r"subspaces must be None, because pyreft has no such setting"
    ):
        save_pyreft(make(), tmp_path / "theirs")
