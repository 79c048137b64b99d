"""Cases: bytes and flops computed by hand, unique ids, and the shapes of each size."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import LLAMA_8B, OpCase, llama
from benchmarks.suites import SIZES, suites
from benchmarks.suites.models import build, make_batch
from benchmarks.suites.op import tensors


def test_bytes_and_flops_of_the_edit():
    case = OpCase("f7+l7", 32, 512, 4096, 8, "bf16")
    assert case.rows == 448
    # h read, h' and the kept h written: 3 · 448 · 4096 · 2; A and R: 2 · 8 · 4096 · 4.
    assert case.bytes("forward") == 11_010_048 + 262_144
    assert case.bytes("backward") == 11_010_048 + 2 * 262_144
    assert case.flops("forward") == 4 * 448 * 8 * 4096
    assert case.flops("backward") == 8 * 448 * 8 * 4096
    assert OpCase("all", 16, 512, 4096, 8).rows == 8192


def test_gpu_cases_of_the_operator_begin_with_the_most_important():
    cases = suites()["op"].cases("gpu")
    assert 20 <= len(cases) <= 28
    assert [(c.positions, c.rows, c.dim, c.rank, c.dtype) for c in cases[:2]] == [
        ("f7+l7", 448, 4096, 8, "bf16"),
        ("all", 8192, 4096, 8, "bf16"),
    ]
    assert {c.rank for c in cases} == {1, 4, 8, 32, 128}
    assert {c.dim for c in cases} == {768, 2048, 4096, 8192}
    assert {c.dtype for c in cases} == {"bf16", "fp32"} and {c.groups for c in cases} == {1, 2}


def test_prompt_ends_of_short_sequences_do_not_overlap():
    """Each end of sixteen tokens has seven rows."""
    rows = tensors(OpCase("f7+l7", 2, 16, 64, 4), torch.device("cpu")).plan.rows
    ends = [*range(7), *range(9, 16)]
    assert rows.tolist() == [16 * sequence + position for sequence in (0, 1) for position in ends]


@pytest.mark.parametrize("size", SIZES)
def test_ids_are_unique(size):
    for suite in suites().values():
        ids = [str(case) for case in suite.cases(size)]
        assert len(set(ids)) == len(ids) > 0


def test_edited_layers():
    case = llama("x", 64, 4, 1, 32)
    assert case.edited_layers == [0, 1, 2, 3]
    assert case.but(edited=2).edited_layers == [2, 3]
    assert case.but(edited=2).shape["edited"] == 2


def test_large_shapes_are_those_of_their_models():
    model = build(LLAMA_8B, torch.device("meta"))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 8_030_261_248
    batch = make_batch(llama("x", 64, 2, 3, 32, vocabulary=64), torch.device("cpu"))
    assert (batch["labels"][:, :16] == -100).all() and (batch["labels"][:, 16:] >= 0).all()
