"""Interpreted scalars convert to integers with every version of NumPy."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from reft_kernels._triton.interpreter import allow_new_numpy

pytestmark = pytest.mark.interpreter("compiled kernels have no such scalars")


@triton.jit
def count(out_ptr, end):
    total = tl.zeros((1,), tl.int32)
    for _ in range(end):
        total += 1
    tl.store(out_ptr + tl.arange(0, 1), total)


def counted() -> int:
    out = torch.zeros(1, dtype=torch.int32)
    count[(1,)](out, 3)
    return int(out)


@pytest.fixture
def faulty(monkeypatch):
    """Behave like Triton 3.6 with NumPy 2.5, which refuses arrays with one element."""
    prepare = interpreter._patch_lang_tensor

    def refuse(self):
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    def prepare_and_spoil(tensor, scope):
        prepare(tensor, scope)
        scope.set_attr(tensor, "__index__", refuse)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", prepare_and_spoil)


@pytest.mark.usefixtures("faulty")
def test_the_fault_is_repaired():
    with pytest.raises(Exception, match="only 0-dimensional arrays"):
        counted()
    allow_new_numpy()
    assert counted() == 3


def test_without_the_fault_nothing_is_changed():
    allow_new_numpy()
    before = interpreter._patch_lang_tensor
    allow_new_numpy()
    assert interpreter._patch_lang_tensor is before and counted() == 3
