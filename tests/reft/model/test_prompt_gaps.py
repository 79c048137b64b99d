"""Columns that the mask leaves out inside a prompt: what is edited, and what comes out, is that of
the attended tokens alone."""

from __future__ import annotations

import pytest
import torch
from test_generate import strong
from tiny_models import PAD, NoReading, bert, edited_rows_of, gpt2, llama, tokens

from reft import ReftConfig
from reft.model.edit_positions import given_columns
from reft.model.prompts import find_packed_prompt, find_prompt
from reft.positions import IGNORED

CPU = torch.device("cpu")

#: Attended columns of each sequence: the second turn of a chat, a gap in the middle, gaps at every
#: place, right padding, none.
MASK = torch.tensor(
    [
        [0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1],
        [0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1],
        [1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
)
PLACE = (MASK.cumsum(1) - 1).clamp(min=0)

SETTINGS = {
    "f2+l2": {},
    "l1": {},
    "f3": {"short_prompts": "paper"},
    "f2+l3": {"tied": False},
    "f1+l2": {"tied": False, "untied_by": "position"},
    "l2": {"prompt_end": "second_to_last"},
    "prompt": {},
    "all": {},
}


def model_of(base, positions, **changes):
    return strong(base, ReftConfig(rank=3, positions=positions, **changes)).eval()


def sequences():
    """The batch, with other tokens in its gaps, and each sequence's attended tokens alone."""
    ids = tokens(*MASK.shape)
    return ids, [ids[row][MASK[row].bool()][None] for row in range(len(ids))]


def compare(model, **call):
    """Every attended token has the logits that it has alone."""
    ids, alone = sequences()
    with torch.no_grad():
        batch = model(input_ids=ids, attention_mask=MASK, position_ids=PLACE, **call).logits
        for row, single in enumerate(alone):
            expected = model(input_ids=single).logits
            if batch.ndim == 2 and not MASK[row, 0]:
                continue  # a classifier reads column 0
            got = batch[row] if batch.ndim == 2 else batch[row][MASK[row].bool()]
            torch.testing.assert_close(got[None], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", SETTINGS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_attended_tokens_are_what_they_are_alone(make, positions):
    compare(model_of(make(), positions, **SETTINGS[positions]))


@pytest.mark.parametrize("positions", ["f2+l2", "prompt"])
def test_an_encoder_is_edited_alike(positions):
    compare(model_of(bert(), positions))


@pytest.mark.parametrize("positions", ["f2+l2", "l1", "prompt", "prompt+g2"])
def test_a_prompt_that_ends_before_the_sequence_does(positions):
    """``prompt_lengths`` and the first label count attended tokens."""
    model = model_of(llama(), positions)
    ids, alone = sequences()
    lengths = [5, 3, 4, 6, 7]
    labels = torch.full_like(ids, IGNORED)
    for row, length in enumerate(lengths):
        column = MASK[row].nonzero().flatten()
        labels[row, column[length:]] = ids[row, column[length:]]
    with torch.no_grad():
        call = {"input_ids": ids, "attention_mask": MASK, "position_ids": PLACE}
        by_labels = model(**call, labels=labels).logits
        by_lengths = model(**call, prompt_lengths=lengths).logits
        for row, single in enumerate(alone):
            expected = model(input_ids=single, prompt_lengths=[lengths[row]]).logits[0]
            for got in (by_labels, by_lengths):
                there = got[row][MASK[row].bool()]
                torch.testing.assert_close(there, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["lists", "tensor"])
def test_numbers_of_tokens_do_not_count_gaps(form):
    model = model_of(llama(), "given")
    ids, alone = sequences()
    given = [[0, -1], [2], [1, 3, -2], [-1], [5]]
    named = given
    if form == "tensor":
        given = [[0, 3, -1], [2, -1, -1], [1, 3, 4], [5, -1, -1], [7, 5, -1]]
        named = torch.tensor(given)
    with torch.no_grad():
        batch = model(
            input_ids=ids, attention_mask=MASK, position_ids=PLACE, edit_positions=named
        ).logits
        for row, single in enumerate(alone):
            wanted = (
                given[row] if form == "lists" else [entry for entry in given[row] if entry >= 0]
            )
            expected = model(input_ids=single, edit_positions=[wanted]).logits[0]
            torch.testing.assert_close(batch[row][MASK[row].bool()], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", [{}, {"prefill_chunk_size": 5}, {"use_cache": False}])
@pytest.mark.parametrize("positions", ["f2+l2", "l1", "prompt", "prompt+g2", "all"])
def test_generation_goes_on_from_attended_tokens(positions, way):
    model = model_of(llama(), positions)
    ids, alone = sequences()
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, **way}
    rows = [0, 1, 2, 4]  # a generation ends in attended tokens
    got = model.generate(ids[rows], attention_mask=MASK[rows], **settings)[:, ids.shape[1] :]
    for at, row in enumerate(rows):
        single = alone[row]
        expected = model.generate(single, attention_mask=torch.ones_like(single), **settings)
        assert got[at].tolist() == expected[0, single.shape[1] :].tolist()


def test_padding_tokens_inside_are_gaps_without_a_mask():
    model = model_of(llama(), "l2")
    ids, alone = sequences()
    gapped = torch.where(MASK.bool(), ids, PAD)[[1]]
    settings = {"max_new_tokens": 4, "do_sample": False}
    got = model.generate(gapped, **settings)[0, ids.shape[1] :]
    expected = model.generate(alone[1], **settings)[0, alone[1].shape[1] :]
    assert got.tolist() == expected.tolist()


def test_beams_and_a_batch_of_several_adapters():
    model = model_of(llama(), "f2+l2")
    model.add_adapter("other", ReftConfig(rank=2, positions="prompt", intervention="noreft"))
    ids, alone = sequences()
    names = ["other", "default", "__base__", "other", "default"]
    with torch.no_grad():
        batch = model(
            input_ids=ids, attention_mask=MASK, position_ids=PLACE, adapter_names=names
        ).logits
        for row, single in enumerate(alone):
            expected = model(input_ids=single, adapter_names=[names[row]]).logits[0]
            torch.testing.assert_close(batch[row][MASK[row].bool()], expected, rtol=1e-4, atol=1e-4)
    beams = {"max_new_tokens": 3, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    got = model.generate(ids[:2], attention_mask=MASK[:2], **beams)[:, ids.shape[1] :]
    for row in range(2):
        mask = torch.ones_like(alone[row])
        expected = model.generate(alone[row], attention_mask=mask, **beams)
        assert got[row].tolist() == expected[0, alone[row].shape[1] :].tolist()


def test_gradients_are_those_of_the_attended_tokens():
    def gradients(run):
        torch.manual_seed(0)
        model = model_of(llama(), "f2+l2").train()
        run(model).backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    ids, alone = sequences()

    def batch(model):
        out = model(input_ids=ids, attention_mask=MASK, position_ids=PLACE).logits
        return (out * MASK.unsqueeze(-1)).square().sum()

    def singly(model):
        return sum(model(input_ids=entry).logits.square().sum() for entry in alone)

    for got, expected in zip(gradients(batch), gradients(singly), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("positions", ["f2+l2", "l1", "prompt", "all"])
def test_packed_sequences_with_columns_left_out(positions):
    """Two sequences in a row, of which the mask leaves tokens out: their rows are those that each
    has alone."""
    config = ReftConfig(rank=2, positions=positions)
    mask = torch.cat([MASK[0], MASK[2]])
    starts = torch.tensor([0, 12])
    prompt = find_packed_prompt(starts, 24, attention_mask=mask[None])
    (rows,) = edited_rows_of(config, prompt, 24)
    expected = set()
    for row, offset in ((0, 0), (2, 12)):
        alone = find_prompt(1, 12, CPU, attention_mask=MASK[row : row + 1])
        (wanted,) = edited_rows_of(config, alone, 12)
        expected |= {entry + offset for entry in wanted.tolist() if entry >= 0}
    assert {entry for entry in rows.tolist() if entry >= 0} == expected
    labels = torch.full((1, 24), IGNORED)
    labels[0, 9:12] = labels[0, 20:] = 3
    limited = find_packed_prompt(starts, 24, attention_mask=mask[None], labels=labels)
    assert limited.length.tolist() == [5, 4]
    given = given_columns([[0, -1], [1, -1]], limited, (1, 24))
    assert given.tolist() == [[2, 8], [15, 18]]


@pytest.mark.parametrize("positions", ["f2+l2", "prompt+g2"])
def test_nothing_is_read_on_the_host(positions, monkeypatch):
    for module in ("prompts", "edit_positions"):
        monkeypatch.setattr(f"reft.model.{module}.visible", lambda tensor: False)
    config = ReftConfig(positions=positions)
    ids = tokens(*MASK.shape)
    with NoReading():
        prompt = find_prompt(5, 12, CPU, attention_mask=MASK, labels=ids).expand(10)
        edited_rows_of(config, prompt, 6, start=3)
        given = given_columns(torch.tensor([[0, 2]] * 10), prompt, (10, 12))
        edited_rows_of(config, prompt, 12, given=given)


def test_rows_of_random_masks_equal_a_count_by_hand():
    generator = torch.Generator().manual_seed(7)
    for _ in range(50):
        mask = (torch.rand(3, 9, generator=generator) < 0.6).long()
        prompt = find_prompt(3, 9, CPU, attention_mask=mask)
        start = int(torch.randint(0, 9, (1,), generator=generator))
        for positions in ("f2+l2", "prompt"):
            config = ReftConfig(positions=positions)
            (rows,) = edited_rows_of(config, prompt, 9 - start, start=start)
            expected = set()
            for row in range(3):
                there = mask[row].nonzero().flatten().tolist()
                half = len(there) // 2
                ends = there[: min(2, half)] + there[len(there) - min(2, half) :]
                for column in there if positions == "prompt" else ends:
                    if column >= start:
                        expected.add(row * (9 - start) + column - start)
            assert {entry for entry in rows.tolist() if entry >= 0} == expected
