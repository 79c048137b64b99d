"""The plan of a forward: which rows, for whom, and that nothing waits for a device."""

from __future__ import annotations

import pytest
import torch
from tiny_models import NoReading

from reft.adapter.parameters import AdapterParameters
from reft.config import ReftConfig
from reft.model.forward_plan import ForwardPlan, Member, member_rows
from reft.model.prompts import Prompt, find_prompt

CPU = torch.device("cpu")


def rows(positions, start, length, window=10, window_start=0, sequences=None, **changes):
    config = ReftConfig(positions=positions, **changes)
    prompt = Prompt(torch.tensor(start), torch.tensor(length))
    sequences = None if sequences is None else torch.tensor(sequences)
    found = member_rows(
        config, prompt, window_start=window_start, window=window, sequences=sequences
    )
    return [one.tolist() for one in found]


def test_rows_of_a_tied_adapter():
    assert rows("f2+l2", [0, 3], [8, 5]) == [[0, 1, 6, 7, 13, 14, 16, 17]]


def test_rows_of_an_untied_adapter_lie_group_by_group():
    assert rows("f2+l1", [0, 3], [8, 2], tied=False) == [[0, 1, 13, -1], [7, 14]]


def test_rows_in_a_window():
    assert rows("f2+l2", [0, 1], [7, 9], window=4, window_start=4) == [
        [-1, -1, 1, 2, -1, -1, -1, -1]
    ]
    assert rows("prompt", [0, 3], [6, 3], window=4, window_start=4) == [
        [0, 1, -1, -1, 4, 5, -1, -1]
    ]
    assert rows("all", [0, 6], [6, 3], window=4, window_start=4) == [[0, 1, 2, 3, -1, -1, 6, 7]]


def test_rows_of_some_sequences():
    assert rows("l1", [0, 1, 2], [4, 4, 4], sequences=[2, 0]) == [[25, 3]]


def test_prompts_from_each_source():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    labels = torch.tensor(
        [[-100, -100, -100, -100, 5, 5], [-100, 7, -100, 7, -100, -100], [-100] * 6]
    )

    def found(**sources):
        prompt = find_prompt(3, 6, CPU, **sources)
        first = prompt.columns(torch.zeros(3, 1, dtype=torch.int64))
        return first.flatten().tolist(), prompt.length.tolist()

    assert found() == ([0, 0, 0], [6, 6, 6])
    assert found(attention_mask=mask) == ([2, 0, 0], [4, 4, 6])
    assert found(attention_mask=mask.bool(), labels=labels) == ([2, 0, 0], [2, 1, 6])
    assert found(labels=labels) == ([0, 0, 0], [4, 1, 6])
    lengths = torch.tensor([1, 4, 0], dtype=torch.int32)
    assert found(attention_mask=mask, labels=labels, prompt_lengths=lengths) == (
        [2, 0, 0],
        [1, 4, 0],
    )
    with pytest.raises(ValueError, match=r"labels must have the shape .*\(3, 6\).*\(3, 5\)"):
        found(labels=labels[:, :5])
    with pytest.raises(ValueError, match="sequence 1 has 4, got 5"):
        found(attention_mask=mask, prompt_lengths=[1, 5, 2])
    with pytest.raises(ValueError, match="where a prompt starts"):
        found(attention_mask=mask[:, None, None], prompt_lengths=[1, 1, 1])


def test_prompts_are_repeated_for_beams():
    prompt = Prompt(torch.tensor([0, 2]), torch.tensor([5, 3]))
    wide = prompt.expand(6)
    assert (wide.start.tolist(), wide.length.tolist()) == ([0, 0, 0, 2, 2, 2], [5, 5, 5, 3, 3, 3])
    assert prompt.expand(2) is prompt
    with pytest.raises(ValueError, match="5 sequences cannot come from 2 prompts"):
        prompt.expand(5)


def member(layers=(0, 1), places=((0, 1),), **changes):
    settings = {"rank": 2, "positions": "f2+l2", **changes}
    adapter = AdapterParameters(ReftConfig(**settings), layers, 8)
    return Member(adapter, tuple(torch.tensor(one) for one in places), 0.0)


def site(layer):
    return (layer, "block_output")


class TestAssembly:
    def test_one_adapter_shares_its_rows(self):
        plan = ForwardPlan([member(places=([0, 1], [5]), tied=False)], (2, 3))
        (first,), (second,) = plan.edits[site(0)], plan.edits[site(1)]
        assert first.rows is second.rows
        assert first.rows.rows.tolist() == [0, 1, 5]
        assert first.rows.offsets == (0, 2, 3)

    def test_adapters_of_one_form_become_groups(self):
        members = [
            member(layers=(0, 2)),
            member(layers=(2,), places=([3], [4]), rank=4, tied=False),
            member(layers=(2,), places=([6],), intervention="lobireft", rank=1),
        ]
        plan = ForwardPlan(members, (1, 9))
        assert sorted(plan.edits) == [site(0), site(2)]
        (alone,), (joined,) = plan.edits[site(0)], plan.edits[site(2)]
        assert (alone.rows.offsets, joined.rows.offsets) == ((0, 2), (0, 2, 3, 4, 5))
        assert joined.rows.rows.tolist() == [0, 1, 3, 4, 6]
        weights = joined.weights
        assert weights.decode.shape == weights.encode.shape == (4, 4, 8)
        assert weights.bias.shape == (4, 4)
        assert weights.decode[0, 2:].abs().max() == 0
        assert weights.encode[3].abs().max() == 0
        torch.testing.assert_close(weights.decode[1:3], members[1].adapter.rotation()[0])

    def test_forms_that_differ_stay_apart(self):
        members = [
            member(layers=(0,)),
            member(layers=(0,), places=([4],), activation="relu"),
            member(layers=(0,), places=([7],), activation="relu", intervention="direft"),
        ]
        plan = ForwardPlan(members, (1, 9))
        forms = [one.weights[3:] for one in plan.edits[site(0)]]
        assert forms == [(False, None), (True, "relu"), (False, "relu")]

    def test_fresh_weights_are_the_same_numbers(self):
        plan = ForwardPlan([member()], (1, 4))
        again = plan.again()
        assert torch.equal(
            again.edits[site(0)][0].weights.decode, plan.edits[site(0)][0].weights.decode
        )
        assert again.edits[site(0)][0].weights.decode is not plan.edits[site(0)][0].weights.decode


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_is_read_on_the_host(tied, monkeypatch):
    """As for tensors on a device, whose values the host checks of CPU tensors do not look at."""
    monkeypatch.setattr("reft_kernels.rows._visible", lambda tensor: False)
    config = ReftConfig(positions="f2+l2", tied=tied)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, 3, 3], [-100, 3, 3, -100, -100]])
    adapter = AdapterParameters(config, (0, 1), 16)
    with NoReading():
        prompt = find_prompt(2, 5, CPU, attention_mask=mask, labels=labels)
        found = member_rows(config, prompt.expand(4), window_start=0, window=5)
        ForwardPlan([Member(adapter, found, 0.0)], (4, 5))
