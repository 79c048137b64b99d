"""The position grammar, and columns in a padded batch against a plain Python oracle."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reft.positions import Positions, padded_positions, parse_positions


def oracle(text, start, length, chunk_start, seq_len, short_prompts, prompt_end):
    """Compute (prefix, suffix) columns of each sequence directly from the rules."""
    places = []
    for first_column, tokens in zip(start, length, strict=True):
        prompt = list(range(first_column, first_column + tokens))
        if prompt_end == "second_to_last":
            prompt = prompt[:-1]
        seen = range(chunk_start, chunk_start + seq_len)
        if text == "all":
            prefix, suffix = [column for column in seen if column >= first_column], []
        elif text == "prompt":
            prefix, suffix = prompt, []
        else:
            wanted = {part[0]: int(part[1:]) for part in text.split("+")}
            floor = len(prompt) // 2
            ceiling = (len(prompt) + 1) // 2 if short_prompts == "paper" else floor
            prefix = prompt[: min(wanted.get("f", 0), floor)]
            take = min(wanted.get("l", 0), ceiling)
            suffix = prompt[len(prompt) - take :]
        places.append(
            (
                [column - chunk_start for column in prefix if column in seen],
                [column - chunk_start for column in suffix if column in seen],
            )
        )
    return places


def split(result, spec):
    """Convert (B, P) columns to lists of prefix and suffix columns without −1."""
    at = spec.first if spec.kind == "ends" else result.shape[1]
    return [
        ([p for p in row[:at] if p != -1], [p for p in row[at:] if p != -1])
        for row in result.tolist()
    ]


def check(text, start, length, chunk_start, seq_len, short_prompts, prompt_end):
    spec = parse_positions(text)
    result = padded_positions(
        spec,
        torch.tensor(start),
        torch.tensor(length),
        chunk_start=chunk_start,
        seq_len=seq_len,
        short_prompts=short_prompts,
        prompt_end=prompt_end,
    )
    places = spec.first + spec.last if spec.kind == "ends" else seq_len
    assert result.shape == (len(start), places)
    assert result.dtype == torch.int64
    expected = oracle(text, start, length, chunk_start, seq_len, short_prompts, prompt_end)
    assert split(result, spec) == expected
    for row in result.tolist():
        used = [p for p in row if p != -1]
        assert len(set(used)) == len(used)
        assert all(0 <= p < seq_len for p in used)


TEXTS = ["f7+l7", "f3+l1", "f1+l4", "f3", "l1", "l5", "prompt", "all"]
BATCHES = {
    # (start, length, seq_len): a prompt of each length around the halving, in 20 columns
    "right-padded": ([0] * 9, [0, 1, 2, 3, 5, 13, 14, 15, 20], 20),
    "left-padded": ([20, 19, 18, 17, 15, 7, 6, 5, 0], [0, 1, 2, 3, 5, 13, 14, 15, 20], 20),
    "prompt-inside": ([3, 4, 0], [6, 16, 9], 20),
    "one-column": ([0, 0], [1, 0], 1),
}


@pytest.mark.parametrize("prompt_end", ["last", "second_to_last"])
@pytest.mark.parametrize("short_prompts", ["pyreft", "paper"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("text", TEXTS)
def test_places_are_the_oracles(text, batch, short_prompts, prompt_end):
    start, length, seq_len = BATCHES[batch]
    check(text, start, length, 0, seq_len, short_prompts, prompt_end)


@pytest.mark.parametrize("prompt_end", ["last", "second_to_last"])
@pytest.mark.parametrize("short_prompts", ["pyreft", "paper"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 20])
@pytest.mark.parametrize("text", TEXTS)
def test_chunks_of_a_prompt_hold_each_place_once(text, chunk, short_prompts, prompt_end):
    start, length, total = BATCHES["left-padded"]
    spec = parse_positions(text)
    options = {"short_prompts": short_prompts, "prompt_end": prompt_end}
    whole = padded_positions(
        spec, torch.tensor(start), torch.tensor(length), seq_len=total, **options
    )
    columns = [[] for _ in start]
    for chunk_start in range(0, total, chunk):
        seq_len = min(chunk, total - chunk_start)
        check(text, start, length, chunk_start, seq_len, short_prompts, prompt_end)
        part = padded_positions(
            spec,
            torch.tensor(start),
            torch.tensor(length),
            chunk_start=torch.tensor(chunk_start),  # as a cache on a device counts it
            seq_len=seq_len,
            **options,
        )
        for places, row in zip(columns, part.tolist(), strict=True):
            places += [p + chunk_start for p in row if p != -1]
    assert [sorted(places) for places in columns] == [
        sorted(p for p in row if p != -1) for row in whole.tolist()
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_while_decoding_only_all_edits(text):
    # The prompt fills columns 0 … 9; this step is column 10.
    result = padded_positions(
        parse_positions(text),
        torch.tensor([0, 4]),
        torch.tensor([10, 6]),
        chunk_start=10,
        seq_len=1,
    )
    assert bool((result == 0).any()) == (text == "all")
    assert (result != -1).sum() == (2 if text == "all" else 0)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_places_are_the_oracles_for_any_batch(data):
    text = data.draw(
        st.sampled_from(["prompt", "all", "f1", "f9", "l1", "l9"])
        | st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda n: f"f{n[0]}+l{n[1]}")
    )
    total = data.draw(st.integers(1, 24))
    start, length = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        start.append(data.draw(st.integers(0, total)))
        length.append(data.draw(st.integers(0, total - start[-1])))
    chunk_start = data.draw(st.integers(0, total))
    seq_len = data.draw(st.integers(0, total - chunk_start))
    short_prompts = data.draw(st.sampled_from(["pyreft", "paper"]))
    prompt_end = data.draw(st.sampled_from(["last", "second_to_last"]))
    check(text, start, length, chunk_start, seq_len, short_prompts, prompt_end)


def test_literal_places():
    spec = parse_positions("f2+l3")
    start, length = torch.tensor([0, 2, 5]), torch.tensor([8, 5, 3])
    assert padded_positions(spec, start, length, seq_len=8).tolist() == [
        [0, 1, 5, 6, 7],
        [2, 3, -1, 5, 6],
        [5, -1, -1, -1, 7],
    ]
    assert padded_positions(spec, start, length, seq_len=8, short_prompts="paper").tolist() == [
        [0, 1, 5, 6, 7],
        [2, 3, 4, 5, 6],
        [5, -1, -1, 6, 7],
    ]
    # l1 is then the second to last token of the prompt, as in four of pyreft's datasets.
    columns = padded_positions(
        parse_positions("l1"),
        torch.tensor([0]),
        torch.tensor([25]),
        seq_len=30,
        prompt_end="second_to_last",
    )
    assert columns.tolist() == [[23]]


@pytest.mark.parametrize("text", TEXTS)
def test_compiles_as_one_graph_and_keeps_its_values(text):
    spec = parse_positions(text)

    def places(start, length, chunk_start):
        return padded_positions(spec, start, length, chunk_start=chunk_start, seq_len=6)

    torch.compiler.reset()
    compiled = torch.compile(places, fullgraph=True, backend="eager")
    for chunk_start in (0, 6):
        arguments = torch.tensor([0, 3]), torch.tensor([12, 8]), torch.tensor(chunk_start)
        assert torch.equal(compiled(*arguments), places(*arguments))


@pytest.mark.parametrize("text", TEXTS)
def test_reads_no_value_on_the_host(text):
    # A meta tensor has no values: reading a value would raise.
    spec = parse_positions(text)
    vector = torch.zeros(3, dtype=torch.int32, device="meta")
    chunk_start = torch.zeros((), dtype=torch.int64, device="meta")
    result = padded_positions(spec, vector, vector, chunk_start=chunk_start, seq_len=5)
    assert result.device.type == "meta"
    assert result.shape == (3, spec.first + spec.last if spec.kind == "ends" else 5)


def test_bad_arguments_are_refused():
    spec, vector = parse_positions("f1"), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"start and length.*\(2,\) and \(3,\)"):
        padded_positions(spec, vector, torch.zeros(3, dtype=torch.int64), seq_len=4)
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        padded_positions(spec, vector[None], vector[None], seq_len=4)
    with pytest.raises(ValueError, match="seq_len must be at least 0, got -1"):
        padded_positions(spec, vector, vector, seq_len=-1)
    with pytest.raises(ValueError, match=r"short_prompts.*paper.*got 'x'"):
        padded_positions(spec, vector, vector, seq_len=4, short_prompts="x")
    with pytest.raises(ValueError, match=r"prompt_end.*second_to_last.*got 'x'"):
        padded_positions(spec, vector, vector, seq_len=4, prompt_end="x")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("f7+l7", Positions("ends", 7, 7)),
        ("f12+l1", Positions("ends", 12, 1)),
        ("f3", Positions("ends", 3, 0)),
        ("l10", Positions("ends", 0, 10)),
        ("prompt", Positions("prompt")),
        ("all", Positions("all")),
    ],
)
def test_the_grammar_and_back(text, spec):
    assert parse_positions(text) == spec
    assert str(spec) == text


BAD = ["", "7", "f", "l", "+", "f0", "l0", "f-1", "f1.5", "l7+f7", "f7+l7+f1", "f7+", "+l7", "f7l7"]
BAD += ["f7 + l7", " f7", "f7+f7", "l7+l7", "F7", "f07", "f٣", "every", "Prompt", None, 7]


@pytest.mark.parametrize("text", BAD, ids=repr)
def test_anything_else_is_refused_with_what_is_allowed(text):
    with pytest.raises(ValueError) as caught:
        parse_positions(text)
    for said in ("positions", repr(text), "f7+l7", "f3", "l1", "prompt", "all"):
        assert said in str(caught.value)


def test_groups_of_columns():
    spec = parse_positions("f2+l3")
    assert (spec.columns(tied=False), spec.num_groups(tied=False)) == ([0, 0, 1, 1, 1], 2)
    assert (spec.columns(tied=True), spec.num_groups(tied=True)) == ([0] * 5, 1)
    assert spec.columns(False, "position") == [0, 1, 2, 3, 4]
    assert (spec.num_groups(False, "position"), spec.num_groups(True, "position")) == (5, 1)
    for text, tied in itertools.product(["f2", "l2"], [True, False]):
        one_sided = parse_positions(text)
        assert (one_sided.columns(tied), one_sided.num_groups(tied)) == ([0, 0], 1)
    for text, tied in itertools.product(["prompt", "all"], [True, False]):
        assert parse_positions(text).num_groups(tied) == 1
        with pytest.raises(ValueError, match=text):
            parse_positions(text).columns(tied)
