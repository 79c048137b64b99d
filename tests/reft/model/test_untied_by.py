"""untied_by="position": a set of weights for each edited token, which is the paper's formula."""

from __future__ import annotations

import pytest
import torch
from tiny_models import LAYERS, blocks_of, edit, llama, padded, parameters_of

from reft import ReftConfig, ReftModel, get_reft_model, save_pyreft

FIRST, LAST = 3, 2


def make(**changes) -> tuple[ReftModel, ReftConfig]:
    config = ReftConfig(
        rank=2, positions=f"f{FIRST}+l{LAST}", tied=False, untied_by="position", **changes
    )
    torch.manual_seed(5)
    model = get_reft_model(llama(), config)
    adapter = model.base_model.reft.adapter("default")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.5)
    return model.eval(), config


def expected_group(token: int, n: int) -> int | None:
    """The formula: prefix position p has set p, and suffix positions are counted from the end."""
    half = n // 2
    if token < min(FIRST, half):
        return token
    from_end = n - 1 - token
    if from_end < min(LAST, half):
        return FIRST + LAST - 1 - from_end
    return None


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_token_has_its_own_weights(side):
    lengths = [2, 3, 4, 5, 9]
    ids, mask, _ = padded(lengths, side)
    model, config = make()
    values = parameters_of(model)
    assert values["bias"].shape[:2] == (LAYERS, FIRST + LAST)

    plain = llama()
    width = ids.shape[1]

    def hook(layer):
        def run(module, args, output):
            out = (output[0] if isinstance(output, tuple) else output).clone()
            for row, n in enumerate(lengths):
                start = width - n if side == "left" else 0
                for token in range(n):
                    group = expected_group(token, n)
                    if group is not None:
                        column = start + token
                        hidden = out[row, column : column + 1].clone()
                        out[row, column] = edit(hidden, config, values, layer, group)[0]
            return (out, *output[1:]) if isinstance(output, tuple) else out

        return run

    for layer, block in enumerate(blocks_of(plain)):
        block.register_forward_hook(hook(layer))
    expected = plain(input_ids=ids, attention_mask=mask).logits
    actual = model(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)
    actual[real].square().sum().backward()
    expected[real].square().sum().backward()
    adapter = model.base_model.reft.adapter("default")
    torch.testing.assert_close(adapter.bias.grad, values["bias"].grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(adapter.weight.grad, values["weight"].grad, rtol=1e-3, atol=1e-3)


def test_it_differs_from_untied_by_side():
    ids, _, _ = padded([9], "left")
    model, _ = make()
    by_side = ReftConfig(rank=2, positions=f"f{FIRST}+l{LAST}", tied=False)
    assert (make()[1].num_groups, by_side.num_groups) == (5, 2)
    assert ReftConfig(positions="f3", tied=False, untied_by="position").num_groups == 3
    assert ReftConfig(positions="f3", tied=False).num_groups == 1
    assert not torch.equal(model(ids).logits, get_reft_model(llama(), by_side)(ids).logits)


def test_saved_and_loaded_bit_for_bit(tmp_path):
    ids, _, _ = padded([7], "left")
    model, config = make()
    model.save_pretrained(tmp_path)
    again = ReftModel.from_pretrained(llama(), tmp_path).eval()
    assert again.configs["default"] == config
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_generation_edits_the_prompt_alone():
    ids, mask, singles = padded([4, 9], "left")
    model, _ = make()
    both = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    for row, single in enumerate(singles):
        alone = model.generate(
            input_ids=single, attention_mask=torch.ones_like(single), max_new_tokens=4,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        new = alone[0, single.shape[1] :].tolist()
        assert both[row, ids.shape[1] :].tolist()[: len(new)] == new


def test_unsupported_combinations_are_refused(tmp_path):
    for changes in ({"tied": True}, {"tied": False, "positions": "prompt"}):
        with pytest.raises(ValueError, match=r"untied_by=\"position\" needs tied=False"):
            ReftConfig(untied_by="position", **changes)
    model, _ = make()
    with pytest.raises(ValueError, match=r"edit_positions need one set of weights.*has 5"):
        model(torch.ones(1, 4, dtype=torch.long), edit_positions=[[1]])
    with pytest.raises(ValueError, match=r"untied_by must be 'side'.*'position'"):
        save_pyreft(model, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
