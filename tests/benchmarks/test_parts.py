"""Undisturbed steps: what is cut where, and that one slow round in each part does not show."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.parts import Parts, undisturbed, undisturbed_ratio


def small(layers=3):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, vocab_size=40,
            intermediate_size=48,
        )
    )  # fmt: skip


def test_a_step_is_cut_inside_every_block_forward_and_backward():
    model, ids = small(), torch.arange(6).unsqueeze(0)
    parts = Parts(model)

    def step():
        model(input_ids=ids, labels=ids).loss.backward()

    assert len(parts(step)) == 2 * 3 + 1
    assert len(parts(step)) == 2 * 3 + 1  # nothing is left of the step before
    with torch.no_grad():
        assert len(parts(lambda: model(input_ids=ids))) == 3 + 1


def test_the_parts_add_up_to_the_step():
    import time

    model, ids = small(), torch.arange(6).unsqueeze(0)
    parts = Parts(model)

    def step():
        model(input_ids=ids)
        time.sleep(0.05)

    times = parts(step)
    assert all(one >= 0 for one in times) and times[-1] >= 0.05


def test_marks_change_neither_loss_nor_gradients():
    plain, marked, ids = small(), small(), torch.arange(6).unsqueeze(0)
    parts = Parts(marked)
    wanted = plain(input_ids=ids, labels=ids).loss
    wanted.backward()
    found = []

    def step():
        found.append(marked(input_ids=ids, labels=ids).loss)
        found[0].backward()

    parts(step)
    assert torch.equal(found[0], wanted)
    pairs = zip(plain.parameters(), marked.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_a_disturbance_of_one_round_does_not_show():
    quiet = [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]
    disturbed = [[1.0, 9.0, 1.0], [7.0, 2.0, 2.5]]
    assert undisturbed(quiet) == undisturbed(disturbed) == pytest.approx(3.0)


def test_the_ratio_and_its_halves():
    own, floor = [[2.0, 2.2, 3.0], [2.0, 2.0, 2.0]], [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]
    ratio = undisturbed_ratio(own, floor)
    assert ratio.median == pytest.approx(4 / 3) and ratio.rounds == 3
    assert (ratio.p20, ratio.p80) == (pytest.approx(4 / 3), pytest.approx(4.2 / 3))
    one = undisturbed_ratio([[3.0]], [[2.0]])
    assert (one.median, one.p20, one.p80) == (1.5, 1.5, 1.5)
