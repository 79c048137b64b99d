"""The emulated matrix units, against a loop over numbers and inside the kernels."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from matrix_units import AT_ONCE, rounded, tf32, tf32x3, truncated

from reft_kernels import lowrank_edit_
from reft_kernels._triton import launch
from reft_kernels.devtools.testing import Case, budget, make_edit, run_edit

pytestmark = pytest.mark.interpreter("a GPU has matrix units of its own")
M, N, K = 16, 16, 32


def cut(value: Fraction, bits: int) -> Fraction:
    """Truncate ``value`` to ``bits`` bits of mantissa after the leading one."""
    if value == 0:
        return value
    size, exponent = abs(value), 0
    while size >= 2:
        size, exponent = size / 2, exponent + 1
    while size < 1:
        size, exponent = size * 2, exponent - 1
    kept = Fraction(int(size * 2**bits), 2**bits) * Fraction(2) ** exponent
    return kept if value > 0 else -kept


def nearest(value: Fraction, bits: int) -> Fraction:
    """Round to ``bits`` bits of mantissa, halves away from 0."""
    low = cut(value, bits)
    rest = 2 * (value - low)
    return low if cut(low + rest, bits) == low else cut(low + rest, bits)


def product(a, b, total, operand):
    """Compute ``total`` + a b one element and 8 products at a time; ``operand`` converts inputs."""
    out = np.empty_like(total)
    for i, j in np.ndindex(total.shape):
        left, right = ([operand(Fraction(float(x))) for x in line] for line in (a[i], b[:, j]))
        value = Fraction(float(total[i, j]))
        for start in range(0, len(left), AT_ONCE):
            products = (left[k] * right[k] for k in range(start, start + AT_ONCE))
            value = cut(value + sum(products), 23)
        out[i, j] = float(value)
    return out


def matrices(seed):
    random = np.random.default_rng(seed)
    shapes = ((3, 24), (24, 4), (3, 4))
    made = [
        random.standard_normal(shape) * 2.0 ** random.integers(-9, 9, shape) for shape in shapes
    ]
    return [values.astype(np.float32) for values in made]


@pytest.mark.parametrize("seed", range(3))
def test_tf32_is_the_loop(seed):
    a, b, total = matrices(seed)
    expected = product(a, b, total, lambda x: cut(x, 10))
    assert np.array_equal(tf32(a, b, total), expected)
    assert not np.array_equal(a @ b + total, expected)
    batch = [np.stack([values, values]) for values in (a, b, total)]
    assert np.array_equal(tf32(*batch), np.stack([expected, expected]))


@pytest.mark.parametrize("seed", range(3))
def test_tf32x3_is_three_loops(seed):
    a, b, total = matrices(seed)
    a_high, b_high = (
        np.array([float(nearest(Fraction(float(x)), 10)) for x in values.flat], np.float32)
        for values in (a, b)
    )
    a_high, b_high = a_high.reshape(a.shape), b_high.reshape(b.shape)
    small = np.zeros_like(total)
    for left, right in ((a - a_high, b_high), (a_high, b - b_high), (a_high, b_high)):
        small = product(left, right, small, lambda x: cut(x, 10))
    assert np.array_equal(tf32x3(a, b, total), small + total)


def test_parts_of_a_number():
    step = 2.0**-10
    values = np.array(
        [1 + step * 0.75, -1 - step * 0.75, 1 + step / 2, 1 + step / 4, 0], np.float32
    )
    assert truncated(values).tolist() == [1, -1, 1, 1, 0]
    assert rounded(values).tolist() == [1 + step, -1 - step, 1 + step, 1, 0]
    for part in (truncated, rounded):
        inf, nan = part(np.array([np.inf, np.nan], np.float32))
        assert inf == np.inf and np.isnan(nan)


def test_infinity_is_not_lost_in_its_parts():
    a, b, total = matrices(0)
    a[1, 2] = np.inf
    with np.errstate(invalid="ignore"):
        result = tf32x3(a, b, total)
    assert np.array_equal(result[1], np.sign(b[2]) * np.inf) and np.isfinite(result[[0, 2]]).all()


@triton.jit
def multiply(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """out (16, 16) = a (16, 32) b (32, 16) + 1."""
    m, n, k = tl.arange(0, 16), tl.arange(0, 16), tl.arange(0, 32)
    a = tl.load(a_ptr + m[:, None] * 32 + k[None, :])
    b = tl.load(b_ptr + k[:, None] * 16 + n[None, :])
    ones = tl.full((16, 16), 1.0, ACC)
    total = tl.dot(a, b, ones, input_precision=PRECISION, out_dtype=ACC)
    tl.store(out_ptr + m[:, None] * 16 + n[None, :], total)


@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "ieee"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kernel_gets_the_requested_precision(precision, dtype):
    a, b = torch.randn(M, K, dtype=dtype), torch.randn(K, N, dtype=dtype)
    out = torch.empty(M, N, dtype=dtype)
    multiply[(1,)](a, b, out, precision, tl.float64 if dtype is torch.float64 else tl.float32)
    emulated = {"tf32": tf32, "tf32x3": tf32x3}.get(precision)
    if emulated is None or dtype is torch.float64:
        expected = a.numpy() @ b.numpy() + 1
    else:
        expected = emulated(a.numpy(), b.numpy(), np.ones((M, N), np.float32))
    assert np.array_equal(out.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("precision", [None, "tf32"])
def test_a_single_product_breaks_the_budget_and_the_kernels_do_not(precision, dtype, monkeypatch):
    """bfloat16 is coarse enough for it; float16 and float32 are not."""
    if precision is not None:
        choose = launch.choose
        monkeypatch.setattr(
            launch, "choose", lambda *args, **kw: replace(choose(*args, **kw), precision=precision)
        )
    judge = budget(make_edit(Case(65, 16, dtype=dtype)))
    result = run_edit(lowrank_edit_, judge.edit, backend="triton")
    if precision is None or dtype is torch.bfloat16:
        judge.check(result)
    else:
        with pytest.raises(AssertionError, match="error"):
            judge.check(result)
