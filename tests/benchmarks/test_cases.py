"""Bytes and flops by hand, ids that tell cases apart, and the sizes the suites promise."""

from __future__ import annotations

import pytest

from benchmarks.cases import LLAMA_8B, OpCase, llama
from benchmarks.suites import SIZES, suites
from benchmarks.suites.models import build, make_batch


def test_bytes_and_flops_of_the_edit():
    case = OpCase("f7+l7", 32, 512, 4096, 8, "bf16")
    assert case.rows == 448
    # h read, h' and the kept h written: 3 · 448 · 4096 · 2; A and R: 2 · 8 · 4096 · 4.
    assert case.bytes("forward") == 11_010_048 + 262_144
    assert case.bytes("backward") == 11_010_048 + 2 * 262_144
    assert case.flops("forward") == 4 * 448 * 8 * 4096
    assert case.flops("backward") == 8 * 448 * 8 * 4096
    assert OpCase("all", 16, 512, 4096, 8).rows == 8192


def test_gpu_size_of_the_operator_is_the_promised_grid():
    cases = suites()["op"].cases("gpu")
    grid = {(c.positions, c.rows, c.dim, c.rank, c.dtype) for c in cases}
    rows = [("f7+l7", 14), ("f7+l7", 112), ("f7+l7", 448), ("all", 8192), ("all", 32768)]
    assert grid == {
        (positions, count, dim, rank, dtype)
        for positions, count in rows
        for dim in (768, 2048, 4096, 8192)
        for rank in (1, 4, 8, 32, 128)
        for dtype in ("bf16", "fp32")
    }


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
    import torch

    count = sum(one.numel() for one in build(LLAMA_8B, torch.device("meta")).parameters())
    assert count == 8_030_261_248
    batch = make_batch(llama("x", 64, 2, 3, 32, vocabulary=64), torch.device("cpu"))
    assert (batch["labels"][:, :16] == -100).all() and (batch["labels"][:, 16:] >= 0).all()
