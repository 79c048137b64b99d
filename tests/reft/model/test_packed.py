"""Packed batches: several prompts in one row are edited as each is alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import gpt2, llama, tokens
from transformers import DataCollatorWithFlattening

from reft import ReftConfig, get_reft_model
from reft.model.forward_inputs import cache_of, packed_starts
from reft.model.prompts import find_packed_prompt

LENGTHS, PROMPTS = [7, 1, 5, 9], [4, 1, 3, 6]
KINDS = ["f2+l2", "l1", "prompt", "prompt+g1", "all"]


def model_of(base=llama, **changes):
    torch.manual_seed(3)
    return get_reft_model(base(), ReftConfig(**{"rank": 3, "positions": "f2+l2", **changes}))


def features():
    """Four sequences, each with a prompt and, but for the second, labels after it."""
    rows = []
    for seed, (n, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        ids = tokens(1, n, seed + 1)[0].tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def packed(by="cu_seq_lens"):
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features())
    bounds = [batch.pop(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    if by == "cu_seq_lens":
        # position_ids make the mask of every attention that is not FlashAttention.
        batch["cu_seq_lens_q"], batch["cu_seq_lens_k"] = bounds
    batch.pop("max_length_q"), batch.pop("max_length_k")
    # With a cache transformers takes a row for one sequence.
    return {**batch, "use_cache": False}


def alone(model):
    """(logits of each sequence by itself, summed loss of all of them)."""
    logits, loss = [], 0.0
    for row in features():
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        out = model(input_ids=ids, labels=labels)
        logits.append(out.logits[0])
        targets = labels[0, 1:]
        loss = loss + torch.nn.functional.cross_entropy(
            out.logits[0, :-1].float(), targets, ignore_index=-100, reduction="sum"
        )
    return torch.cat(logits), loss


@pytest.mark.parametrize("by", ["cu_seq_lens", "position_ids"])
@pytest.mark.parametrize("base", [llama, gpt2])
@pytest.mark.parametrize("positions", KINDS)
def test_packed_equals_alone(base, positions, by):
    model = model_of(base, positions=positions)
    expected, loss = alone(model)
    loss.backward()
    adapter = model.reft.adapter("default")
    gradients = {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}
    model.zero_grad()
    out = model(**packed(by))
    torch.testing.assert_close(out.logits[0], expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert (model(**packed(by)).logits[0] - expected).abs().max() > 1e-3
    (out.loss * sum(n - p for n, p in zip(LENGTHS, PROMPTS, strict=True))).backward()
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)


def test_untied_ends():
    model = model_of(tied=False)
    with torch.no_grad():
        expected, _ = alone(model)
        torch.testing.assert_close(model(**packed()).logits[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", KINDS)
def test_each_packed_sequence_may_have_its_adapter(positions):
    model = model_of(positions=positions)
    torch.manual_seed(9)
    model.add_adapter("other", ReftConfig(rank=2, positions=positions))
    names = ["other", "default", "__base__", "default"]
    with torch.no_grad():
        parts = []
        for name, row in zip(names, features(), strict=True):
            ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
            parts.append(model(ids, labels=labels, adapter_names=[name]).logits[0])
        out = model(**packed(), adapter_names=names).logits[0]
    torch.testing.assert_close(out, torch.cat(parts), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"one name per sequence \(4 of them\)"):
        model(**packed(), adapter_names=["other"])


def test_lengths_that_the_caller_says():
    model, batch = model_of(), packed()
    with torch.no_grad():
        expected = model(**batch).logits
        del batch["labels"]
        torch.testing.assert_close(model(**batch, prompt_lengths=PROMPTS).logits, expected)
        assert (model(**batch).logits - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="sequence 1 has 1, got 2"):
        model(**batch, prompt_lengths=[4, 2, 3, 6])


def test_several_rows_of_several_sequences():
    ids = tokens(2, 8)
    position = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5]])
    spans = [(0, 0, 5), (0, 5, 8), (1, 0, 2), (1, 2, 8)]
    model = model_of(positions="f1+l1")
    with torch.no_grad():
        out = model(ids, position_ids=position, use_cache=False).logits
        for row, begin, end in spans:
            expected = model(ids[row : row + 1, begin:end]).logits[0]
            torch.testing.assert_close(out[row, begin:end], expected, rtol=1e-4, atol=1e-5)


def test_what_is_packed():
    def starts(position, **call):
        arguments = {"position_ids": torch.tensor(position), **call}
        bounds = packed_starts(arguments, cache_of(arguments), (2, 4))
        return None if bounds is None else bounds.tolist()

    plain = [[0, 1, 2, 3], [2, 3, 4, 5]]
    jumps = [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert starts(plain) is None
    assert starts(jumps) == [0, 2, 4]
    assert starts(jumps, attention_mask=torch.ones(2, 4)) is None
    assert starts([[0, 1, 2, 3]]) is None  # of another shape, such as (3, B, S) of a vision model
    assert starts(jumps, cu_seq_lens_q=torch.tensor([0, 4, 8], dtype=torch.int32)) == [0, 4]


def test_prompts_of_packed_sequences():
    starts = torch.tensor([0, 3, 4])
    labels = torch.tensor([[-100, 5, -100, -100, 7, 7, 7]])

    def lengths(**how):
        return find_packed_prompt(starts, 7, **how).length.tolist()

    assert lengths() == [3, 1, 3]
    assert lengths(labels=labels) == [1, 1, 0]
    assert lengths(prompt_lengths=[2, 0, 3]) == [2, 0, 3]
    with pytest.raises(ValueError, match="one per token, 7 of them"):
        lengths(labels=labels[:, 1:])


def test_cu_seq_lens_are_one_graph():
    model = model_of().train()
    batch = packed()
    expected = model(**batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).loss, expected.loss)
    with pytest.raises(Exception, match="give cu_seq_lens_q too"):
        compiled(**packed("position_ids"))


def test_training_without_padding_is_training(word_tokenizer, make_trainer):
    """Three steps of the trainer, padded and not: the same adapter."""
    from reft import ReftDataCollator

    results = []
    for padding_free in (False, True):
        config = ReftConfig(rank=4, positions="f2+l2")
        trainer = make_trainer(f"run{padding_free}", config=config, max_steps=3)
        trainer.data_collator = ReftDataCollator(word_tokenizer, padding_free=padding_free)
        trainer.train()
        results.append(
            [parameter.detach().clone() for parameter in trainer.model.reft.parameters()]
        )
        trainer.model.unload()
    for padded, free in zip(*results, strict=True):
        torch.testing.assert_close(free, padded, rtol=1e-3, atol=1e-4)
