"""The wrapper: which vectors change, by how much, and that nothing else does."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    bert,
    blocks_of,
    gpt2,
    llama,
    padded,
    parameters_of,
    plain_edits,
    tokens,
)
from torch import nn

from reft import ReftConfig, ReftModel, get_reft_model
from reft_kernels.spec import FAMILY

BASES = {"llama": llama, "gpt2": gpt2, "bert": bert}


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 3, "positions": "f2+l2", **changes})


def hidden_states(model, ids, **inputs):
    """The output of each block, recorded by hooks that are registered last."""
    seen = []
    base = getattr(model, "base_model", model) if isinstance(model, ReftModel) else model
    handles = [
        block.register_forward_hook(
            lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out).clone())
        )
        for block in blocks_of(base)
    ]
    with torch.no_grad():
        model(ids, **inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_forward_equals_the_plain_one(base, tied):
    model = get_reft_model(BASES[base](), config(tied=tied, layers=[0, 2]))
    ids, mask, _ = padded([9, 5, 3], "right")
    with torch.no_grad():
        ours = model(ids, attention_mask=mask).logits
        values = parameters_of(model)
        with model.disable_adapter():
            untouched = model(ids, attention_mask=mask).logits
            spans = [(0, 9), (0, 5), (0, 3)]
            with plain_edits(blocks_of(model.base_model), model.configs["default"], values, spans):
                theirs = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (ours - untouched).abs().max() > 1e-3


def test_exactly_the_chosen_rows_of_the_chosen_blocks_change():
    base = llama()
    ids = tokens(2, 10)
    before = hidden_states(base, ids)
    model = get_reft_model(base, config(layers=[1]))
    after = hidden_states(model, ids)
    assert torch.equal(before[0], after[0])
    changed = (before[1] != after[1]).any(dim=-1)
    assert changed.tolist() == [[c in (0, 1, 8, 9) for c in range(10)]] * 2
    assert not torch.equal(before[2], after[2])


@pytest.mark.parametrize("intervention", FAMILY)
def test_gradients_equal_the_plain_ones(intervention):
    model = get_reft_model(
        llama(), config(intervention=intervention, tied=False, layers=[0, 2])
    ).train()
    ids = tokens(3, 9)
    labels = ids.clone()
    for row, n in enumerate((6, 5, 2)):
        labels[row, :n] = -100
    model(input_ids=ids, labels=labels).loss.backward()
    adapter = model.base_model.reft.adapter("default")
    values = parameters_of(model)
    spans = [(0, 6), (0, 5), (0, 2)]
    with (
        model.disable_adapter(),
        plain_edits(blocks_of(model.base_model), model.configs["default"], values, spans),
    ):
        model(input_ids=ids, labels=labels).loss.backward()
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, values[name].grad, rtol=1e-4, atol=1e-7)
        assert parameter.grad.abs().max() > 0
    grads = [name for name, p in model.named_parameters() if p.grad is not None]
    assert grads == [
        f"base_model.reft.adapters.default.{name}" for name, _ in adapter.named_parameters()
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["f2+l2", "f3", "l1", "prompt", "all"])
def test_a_padded_batch_equals_its_single_sequences(side, positions):
    model = get_reft_model(llama(), config(positions=positions))
    ids, mask, singles = padded([8, 5, 1, 3], side)
    place = mask.cumsum(-1).sub(1).clamp(min=0)
    with torch.no_grad():
        together = model(ids, attention_mask=mask, position_ids=place).logits
        for row, single in enumerate(singles):
            alone = model(single).logits[0]
            torch.testing.assert_close(together[row][mask[row].bool()], alone, rtol=1e-5, atol=2e-6)


def test_the_prompt_is_told_by_prompt_lengths_labels_or_the_mask():
    model = get_reft_model(llama(), config(positions="l1"))
    ids = tokens(2, 8)
    labels = ids.clone()
    labels[0, :4], labels[1, :7] = -100, -100

    def edited(**inputs):
        mask = {name: value for name, value in inputs.items() if name == "attention_mask"}
        with model.disable_adapter():
            base = hidden_states(model, ids, **mask)[0]
        return (hidden_states(model, ids, **inputs)[0] != base).any(-1).int().argmax(-1).tolist()

    assert edited() == [7, 7]
    assert edited(labels=labels) == [3, 6]
    assert edited(prompt_lengths=torch.tensor([2, 5])) == [1, 4]
    assert edited(prompt_lengths=[2, 5], labels=labels) == [1, 4]
    mask = torch.ones_like(ids)
    mask[0, :2], mask[1, 6:] = 0, 0
    assert edited(attention_mask=mask) == [7, 5]
    assert edited(attention_mask=mask, labels=labels) == [3, 5]
    assert edited(attention_mask=mask, prompt_lengths=[2, 2]) == [3, 1]


def test_inputs_are_found_by_position_too():
    model = get_reft_model(llama(), config(positions="l1"))
    ids, mask, _ = padded([6, 3], "right")
    with torch.no_grad():
        assert torch.equal(
            model(ids, mask).logits, model(input_ids=ids, attention_mask=mask).logits
        )
        embedded = model.get_input_embeddings()(ids)
        by_embedding = model(inputs_embeds=embedded, attention_mask=mask).logits
        assert torch.equal(by_embedding, model(ids, mask).logits)
        # The base itself is edited too, whoever calls it.
        assert torch.equal(model.base_model(ids, mask).logits, model(ids, mask).logits)


@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [
        ([3], ValueError, "shape (2,)"),
        ([3, 9], ValueError, "sequence 1 has 8, got 9"),
        ([-1, 2], ValueError, "sequence 0"),
        (torch.tensor([1.0, 2.0]), TypeError, "float32"),
    ],
)
def test_wrong_prompt_lengths_are_refused(lengths, error, words):
    model = get_reft_model(llama(), config())
    with pytest.raises(error, match="prompt_lengths") as caught:
        model(tokens(2, 8), prompt_lengths=lengths)
    assert words in str(caught.value)


def test_a_mask_that_hides_the_prompt_is_refused():
    model = get_reft_model(llama(), config())
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, columns\)"):
        model(tokens(2, 8), attention_mask=mask)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="continuous batching"):
        model(tokens(1, 8), cu_seq_lens_q=torch.tensor([0, 5, 8]), read_index=[torch.arange(8)])


@pytest.mark.parametrize("base", BASES)
def test_disabled_is_the_base_bit_for_bit(base):
    plain = BASES[base]()
    ids = tokens(2, 8)
    with torch.no_grad():
        expected = plain(ids).logits
        model = get_reft_model(plain, config())
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, expected)
            with pytest.raises(KeyError), model.disable_adapter():
                raise KeyError
            assert torch.equal(model(ids).logits, expected)
        assert not torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("base", BASES)
def test_unload_gives_the_base_back(base):
    plain = BASES[base]()
    frozen = next(iter(dict(plain.named_parameters())))
    plain.get_parameter(frozen).requires_grad_(False)
    ids = tokens(2, 8)
    with torch.no_grad():
        expected = plain(ids).logits
    kinds = {name: type(module) for name, module in plain.named_modules()}
    model = get_reft_model(plain, config())
    with torch.no_grad():
        model(ids)
    back = model.unload()
    assert back is plain
    assert not hasattr(back, "reft")
    assert {name: type(module) for name, module in back.named_modules()} == kinds
    for module in back.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_with_kwargs
        assert not module._forward_hooks_always_called
    assert [n for n, p in back.named_parameters() if not p.requires_grad] == [frozen]
    with torch.no_grad():
        assert torch.equal(back(ids).logits, expected)
    get_reft_model(back, config())  # and it can be wrapped again


def test_foreign_hooks_survive():
    base = llama()
    block, calls = base.model.layers[1], []
    block.register_forward_hook(lambda m, a, out: calls.append("before"))
    model = get_reft_model(base, config())
    block.register_forward_pre_hook(lambda m, a: calls.append("pre"))
    block.register_forward_hook(lambda m, a, out: calls.append("after"))
    with torch.no_grad():
        model(tokens(1, 6))
        model.generate(tokens(1, 6), max_new_tokens=2, do_sample=False)
    model.unload()
    with torch.no_grad():
        base(tokens(1, 6))
    assert calls == ["pre", "before", "after"] * 4


def test_recorded_hidden_states_are_the_edited_ones():
    base = llama()
    ids = tokens(2, 7)
    with torch.no_grad():
        base(ids, output_hidden_states=True)  # the recorder is there before the edit
        model = get_reft_model(base, config())
        seen = hidden_states(model, ids)
        recorded = model(ids, output_hidden_states=True).hidden_states
        model.base_model.reft.in_place = False
        model.unload()
    for hooked, theirs in zip(seen[:-1], recorded[1:-1], strict=True):
        assert torch.equal(hooked, theirs)


@pytest.mark.parametrize("in_place", [True, False])
def test_both_ways_of_writing_give_the_same(in_place):
    model = get_reft_model(llama(), config())
    ids = tokens(2, 7)
    expected = model(ids).logits
    model.base_model.reft.in_place = in_place
    assert torch.equal(model(ids).logits, expected)


def test_an_output_that_is_the_input_is_not_overwritten():
    class Skipped(nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states

    base = llama()
    base.model.layers[1] = Skipped()
    model = get_reft_model(base, config(layers=[1]))
    ids = tokens(1, 6)
    inputs, outputs = [], []
    block = base.model.layers[1]
    block.register_forward_hook(lambda m, a, out: inputs.append(a[0].clone()))
    block.register_forward_hook(lambda m, a, out: outputs.append(out.clone()))
    with torch.no_grad():
        model(ids)
        with model.disable_adapter():
            model(ids)
    assert torch.equal(inputs[0], inputs[1])
    assert not torch.equal(outputs[0], outputs[1])


def test_nothing_below_the_first_edited_block_records_gradients():
    model = get_reft_model(llama(), config(layers=[1])).train()
    recorded = []
    for block in model.base_model.model.layers:
        block.register_forward_hook(lambda m, a, out: recorded.append(out.requires_grad))
    model(tokens(1, 6))
    assert recorded == [False, True, True]


def test_empty_prompts_still_reach_every_parameter():
    model = get_reft_model(llama(), config(tied=False)).train()
    ids = tokens(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()  # no prompt at all: every row is −1
    adapter = model.base_model.reft.adapter("default")
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bf16_base_keeps_fp32_parameters(autocast):
    base = llama()
    model = get_reft_model(base if autocast else base.to(torch.bfloat16), config()).train()
    adapter = model.base_model.reft.adapter("default")
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    ids = tokens(2, 8)
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in adapter.parameters()
    )
    values = parameters_of(model)
    with (
        model.disable_adapter(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        plain_edits(blocks_of(base), model.configs["default"], values, [(0, 5), (0, 5)]),
    ):
        expected = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(loss.float(), expected.float(), rtol=2e-2, atol=2e-2)
    assert model.orthonormality_error() < 1e-5
