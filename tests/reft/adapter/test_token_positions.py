"""Edited tokens computed on the host, compared with those of a forward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reft import ReftConfig
from reft.adapter.token_positions import positions_between, token_positions
from reft.positions import padded_positions


@given(
    positions=st.sampled_from(["f3+l2", "f2", "l4", "prompt", "all", "prompt+g2"]),
    tied=st.booleans(),
    by=st.sampled_from(["side", "position"]),
    short=st.sampled_from(["pyreft", "paper"]),
    end=st.sampled_from(["last", "second_to_last"]),
    length=st.integers(0, 12),
)
def test_they_equal_those_of_a_forward(positions, tied, by, short, end, length):
    tied = tied or positions[0] in "pa"
    by = "side" if tied or "+" not in positions else by
    config = ReftConfig(
        positions=positions, tied=tied, untied_by=by, short_prompts=short, prompt_end=end
    )
    window = padded_positions(
        config.parsed_positions,
        torch.tensor([2]),
        torch.tensor([length]),
        seq_len=20,
        short_prompts=short,
        prompt_end=end,
    )[0].tolist()
    prompt = [at - 2 for at in window if 0 <= at - 2 < length]
    edited = token_positions(config, length)
    assert [at for at, _ in edited] == sorted(prompt)
    assert all(0 <= group < config.num_groups for _, group in edited)


def test_groups_of_the_edited_tokens():
    config = ReftConfig(positions="f2+l2", tied=False)
    assert token_positions(config, 9) == ((0, 0), (1, 0), (7, 1), (8, 1))
    apart = ReftConfig(positions="f2+l2", tied=False, untied_by="position")
    assert token_positions(apart, 9) == ((0, 0), (1, 1), (7, 2), (8, 3))
    assert token_positions(apart, 3) == ((0, 0), (2, 3))
    with pytest.raises(ValueError, match="cannot be computed from the lengths"):
        token_positions(ReftConfig(positions="given"), 9)


def test_positions_between():
    positions = ((0, 0), (1, 0), (7, 1), (8, 1))
    assert positions_between(positions, 0, 4) == positions[:2]
    assert positions_between(positions, 1, 8) == positions[1:3]
    assert positions_between(positions, 2, 7) == ()
    assert positions_between(positions, 8, 16) == positions[3:]
