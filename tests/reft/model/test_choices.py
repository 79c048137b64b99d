"""Encoders that choose among several texts: every text is edited as it is alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import DIM, PAD, VOCAB
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    DistilBertConfig,
    DistilBertForMultipleChoice,
    RobertaConfig,
    RobertaForMultipleChoice,
)

from reft import ReftConfig, ReftModel, get_reft_model

SIZES = {
    "vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": PAD,
    "initializer_range": 0.2,
}  # fmt: skip


def distilbert():
    config = DistilBertConfig(
        vocab_size=VOCAB, dim=DIM, n_layers=2, n_heads=4, hidden_dim=32, pad_token_id=PAD,
        initializer_range=0.2,
    )  # fmt: skip
    return DistilBertForMultipleChoice(config)


BASES = {
    "bert": lambda: BertForMultipleChoice(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForMultipleChoice(RobertaConfig(**SIZES)),
    "distilbert": distilbert,
}


def wrapped(name, **changes):
    torch.manual_seed(0)
    settings = {"rank": 2, "positions": "f1+l1", "modules_to_save": ["classifier"], **changes}
    model = get_reft_model(BASES[name]().eval(), ReftConfig(**settings)).eval()
    with torch.no_grad():
        model.reft.adapter("default").bias.normal_(std=2.0)
    return model


def batch(choices=3):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, choices, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 1, 4:] = mask[1, :, 6:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def singly(model, call, **more):
    """The score of each text, in a batch of one example with one text."""
    scores = torch.empty(call["input_ids"].shape[:2])
    for i in range(scores.shape[0]):
        for j in range(scores.shape[1]):
            text = {name: value[i : i + 1, j : j + 1] for name, value in call.items()}
            extra = {name: value(i, j) for name, value in more.items()}
            scores[i, j] = model(**text, **extra).logits
    return scores


@pytest.mark.parametrize("positions", ["f1+l1", "l1", "prompt"])
@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_each_text_is_edited_as_it_is_alone(name, positions):
    model, call = wrapped(name, positions=positions), batch()
    got = model(**call).logits
    torch.testing.assert_close(got, singly(model, call), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert (model(**call).logits - got).abs().max() > 1e-4


@torch.no_grad()
def test_what_a_call_says_of_examples_and_of_texts():
    model, call = wrapped("bert", modules_to_save=None), batch()
    model.add_adapter("other", ReftConfig(rank=1, positions="prompt", intervention="noreft"))
    names, scales = ["other", "default"], [1.5, 0.5]
    got = model(**call, adapter_names=names, adapter_scales=scales).logits
    expected = singly(
        model, call, adapter_names=lambda i, j: [names[i]], adapter_scales=lambda i, j: scales[i]
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    lengths = torch.tensor([[3, 2, 5], [4, 4, 1]])
    got = model(**call, prompt_lengths=lengths).logits
    expected = singly(model, call, prompt_lengths=lambda i, j: [[int(lengths[i, j])]])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    given = [[[0], [1, -1], [2]], [[-1], [0, 3], [1]]]
    got = model(**call, edit_positions=given).logits
    expected = singly(model, call, edit_positions=lambda i, j: [[given[i][j]]])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_it_learns_and_comes_back(tmp_path):
    model, call = wrapped("bert"), batch()
    labels = torch.tensor([2, 0])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    losses = []
    for _ in range(12):
        loss = model(**call, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval().save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = ReftModel.from_pretrained(BASES["bert"]().eval(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**call).logits, model(**call).logits)
