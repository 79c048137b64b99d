"""The plan of a forward: its rows, its groups, and that nothing waits for a device."""

from __future__ import annotations

import pytest
import torch
from tiny_models import NoReading, edited_rows_of

from reft.adapter.parameters import AdapterParameters
from reft.config import ReftConfig
from reft.model.batch import BatchAdapter
from reft.model.forward_plan import ForwardPlan
from reft.model.prompts import PromptSpans, find_prompt

CPU = torch.device("cpu")


def rows(positions, start, length, seq_len=10, first=0, sequences=None, **changes):
    config = ReftConfig(positions=positions, **changes)
    spans = PromptSpans(torch.tensor(start), torch.tensor(length))
    sequences = None if sequences is None else torch.tensor(sequences)
    groups = edited_rows_of(config, spans, seq_len, start=first, sequences=sequences)
    return [group.tolist() for group in groups]


def test_rows_of_a_tied_adapter():
    assert rows("f2+l2", [0, 3], [8, 5]) == [[0, 1, 6, 7, 13, 14, 16, 17]]


def test_rows_of_an_untied_adapter_lie_group_by_group():
    assert rows("f2+l1", [0, 3], [8, 2], tied=False) == [[0, 1, 13, -1], [7, 14]]


def test_rows_in_a_chunk():
    assert rows("f2+l2", [0, 1], [7, 9], seq_len=4, first=4) == [[-1, -1, 1, 2, -1, -1, -1, -1]]
    assert rows("prompt", [0, 3], [6, 3], seq_len=4, first=4) == [[0, 1, -1, -1, 4, 5, -1, -1]]
    assert rows("all", [0, 6], [6, 3], seq_len=4, first=4) == [[0, 1, 2, 3, -1, -1, 6, 7]]


def test_rows_of_some_sequences():
    assert rows("l1", [0, 1, 2], [4, 4, 4], sequences=[2, 0]) == [[25, 3]]


def test_prompts_from_each_source():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    labels = torch.tensor(
        [[-100, -100, -100, -100, 5, 5], [-100, 7, -100, 7, -100, -100], [-100] * 6]
    )

    def prompts_of(**sources):
        prompt = find_prompt(3, 6, CPU, **sources)
        first = prompt.columns(torch.zeros(3, 1, dtype=torch.int64))
        return first.flatten().tolist(), prompt.length.tolist()

    assert prompts_of() == ([0, 0, 0], [6, 6, 6])
    assert prompts_of(attention_mask=mask) == ([2, 0, 0], [4, 4, 6])
    assert prompts_of(attention_mask=mask.bool(), labels=labels) == ([2, 0, 0], [2, 1, 6])
    assert prompts_of(labels=labels) == ([0, 0, 0], [4, 1, 6])
    lengths = torch.tensor([1, 4, 0], dtype=torch.int32)
    assert prompts_of(attention_mask=mask, labels=labels, prompt_lengths=lengths) == (
        [2, 0, 0],
        [1, 4, 0],
    )
    with pytest.raises(ValueError, match=r"labels must have the shape .*\(3, 6\).*\(3, 5\)"):
        prompts_of(labels=labels[:, :5])
    with pytest.raises(ValueError, match="sequence 1 has 4, got 5"):
        prompts_of(attention_mask=mask, prompt_lengths=[1, 5, 2])
    with pytest.raises(ValueError, match="where a prompt starts"):
        prompts_of(attention_mask=mask[:, None, None], prompt_lengths=[1, 1, 1])


def test_prompts_are_repeated_for_beams():
    prompt = PromptSpans(torch.tensor([0, 2]), torch.tensor([5, 3]))
    wide = prompt.expand(6)
    assert (wide.start.tolist(), wide.length.tolist()) == ([0, 0, 0, 2, 2, 2], [5, 5, 5, 3, 3, 3])
    assert prompt.expand(2) is prompt
    with pytest.raises(ValueError, match="5 sequences cannot come from 2 prompts"):
        prompt.expand(5)


def adapter(layers=(0, 1), **changes):
    settings = {"rank": 2, "positions": "f2+l2", **changes}
    return BatchAdapter("default", AdapterParameters(ReftConfig(**settings), layers, 8))


def plan_of(shape, *members):
    """A plan of (adapter, rows of each of its groups)."""
    adapters = [member for member, _ in members]
    rows = [tuple(torch.tensor(group) for group in groups) for _, groups in members]
    return ForwardPlan(adapters, rows, shape)


def site(layer):
    return (layer, "block_output")


class TestGrouping:
    def test_one_adapter_shares_its_rows(self):
        plan = plan_of((2, 3), (adapter(tied=False), [[0, 1], [5]]))
        (first,), (second,) = plan.edits[site(0)], plan.edits[site(1)]
        assert first.rows is second.rows
        assert first.rows.rows.tolist() == [0, 1, 5]
        assert first.rows.offsets == (0, 2, 3)

    def test_adapters_of_one_kind_become_groups(self):
        untied = adapter(layers=(2,), rank=4, tied=False)
        plan = plan_of(
            (1, 9),
            (adapter(layers=(0, 2)), [[0, 1]]),
            (untied, [[3], [4]]),
            (adapter(layers=(2,), intervention="lobireft", rank=1), [[6]]),
        )
        assert sorted(plan.edits) == [site(0), site(2)]
        (alone,), (joined,) = plan.edits[site(0)], plan.edits[site(2)]
        assert (alone.rows.offsets, joined.rows.offsets) == ((0, 2), (0, 2, 3, 4, 5))
        assert joined.rows.rows.tolist() == [0, 1, 3, 4, 6]
        weights = joined.weights
        assert weights.decode.shape == weights.encode.shape == (4, 4, 8)
        assert weights.bias.shape == (4, 4)
        assert weights.decode[0, 2:].abs().max() == 0
        assert weights.encode[3].abs().max() == 0
        torch.testing.assert_close(weights.decode[1:3], untied.source.rotation()[0])

    def test_other_kinds_stay_apart(self):
        plan = plan_of(
            (1, 9),
            (adapter(layers=(0,)), [[0, 1]]),
            (adapter(layers=(0,), activation="relu"), [[4]]),
            (adapter(layers=(0,), activation="relu", intervention="direft"), [[7]]),
        )
        kinds = [edit.weights[3:] for edit in plan.edits[site(0)]]
        assert kinds == [(False, None), (True, "relu"), (False, "relu")]

    def test_new_weights_have_the_same_values(self):
        plan = plan_of((1, 4), (adapter(), [[0, 1]]))
        (again,), (first,) = plan.again().edits[site(0)], plan.edits[site(0)]
        assert torch.equal(again.weights.decode, first.weights.decode)
        assert again.weights.decode is not first.weights.decode


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_is_read_on_the_host(tied, monkeypatch):
    """The host checks of CPU tensors are off, as for tensors on a device."""
    monkeypatch.setattr("reft_kernels.rows._visible", lambda tensor: False)
    config = ReftConfig(positions="f2+l2", tied=tied)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, 3, 3], [-100, 3, 3, -100, -100]])
    parameters = AdapterParameters(config, (0, 1), 16)
    with NoReading():
        prompt = find_prompt(2, 5, CPU, attention_mask=mask, labels=labels)
        rows = edited_rows_of(config, prompt.expand(4), 5)
        ForwardPlan([BatchAdapter("default", parameters)], [rows], (4, 5))
