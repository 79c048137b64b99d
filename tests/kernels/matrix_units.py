"""The matrix products of Triton's interpreter, made as inexact as those of Hopper.

The interpreter multiplies float32 matrices in float32. On compute capability 9.0 ``tl.dot`` with
the precision "tf32" truncates its operands to 10 bits of mantissa and adds 8 products at a time to
a sum that is truncated to float32. "tf32x3" is Triton's pass F32DotTC: three such products of high
and low parts. A budget that holds under this emulation does not rest on products that a GPU lacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

#: Products that the units add at once (K of one instruction for float32 operands).
AT_ONCE = 8
#: Bits of a float32 mantissa (23) that tf32 (10) has not, and of a float64 one (52) that float32
#: has not.
_BEYOND_TF32 = np.uint32((1 << 13) - 1)
_BEYOND_FLOAT32 = np.uint64((1 << 29) - 1)


@contextmanager
def hopper_products() -> Iterator[None]:
    """Make interpreted ``tl.dot`` of float32 operands compute like Hopper.

    Other operands, and "ieee", keep the interpreter's behaviour.
    """
    exact = InterpreterBuilder.create_dot

    def create_dot(
        self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any
    ) -> Any:
        product = {"TF32": tf32, "TF32x3": tf32x3}.get(input_precision.name)
        if product is None or {a.data.dtype, b.data.dtype, d.data.dtype} != {np.dtype(np.float32)}:
            return exact(self, a, b, d, input_precision, max_num_imprecise_acc)
        with np.errstate(invalid="ignore"):  # inf − inf, as in hardware
            return TensorHandle(product(a.data, b.data, d.data), d.dtype.scalar)

    with mock.patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield


def tf32(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Compute ``total`` + a b in one tf32 product, (…, M, N) from (…, M, K) and (…, K, N), float32.

    K is a multiple of 8.

    Sums of 8 products and the total are formed in float64, whose own rounding is 2⁻²⁹ of what
    truncation takes away.
    """
    steps = a.shape[-1] // AT_ONCE
    a = truncated(a).astype(np.float64).reshape(*a.shape[:-1], steps, AT_ONCE).swapaxes(-3, -2)
    b = truncated(b).astype(np.float64).reshape(*b.shape[:-2], steps, AT_ONCE, b.shape[-1])
    for sums in np.moveaxis(np.matmul(a, b), -3, 0):
        total = _to_float32(total + sums)
    return total


def tf32x3(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Compute ``total`` + a b in three tf32 products, from the smallest to the largest.

    Shapes are those of :func:`tf32`. The pass does not round the low part; the units truncate it.
    """
    a_high, b_high = rounded(a), rounded(b)
    small = tf32(a - a_high, b_high, np.zeros_like(total))
    small = tf32(a_high, b - b_high, small)
    # The low part of inf is NaN; the product of the high parts handles non-finite numbers.
    small[np.isnan(small)] = 0
    return tf32(a_high, b_high, small) + total


def truncated(values: np.ndarray) -> np.ndarray:
    """Truncate float32 to 10 bits of mantissa, like the units' operands."""
    return (_bits(values) & ~_BEYOND_TF32).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """Round float32 to 10 bits of mantissa, halves away from 0, like ``cvt.rna.tf32.f32``."""
    return ((_bits(values) + (_BEYOND_TF32 + 1) // 2) & ~_BEYOND_TF32).view(np.float32)


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


def _to_float32(sums: np.ndarray) -> np.ndarray:
    """Truncate float64 to float32; 2¹²⁸ and more becomes inf, denormal results are rounded."""
    return (sums.view(np.uint64) & ~_BEYOND_FLOAT32).view(np.float64).astype(np.float32)
