"""Errors of ``orthonormalize`` and ``reflector_base`` name the argument and its value."""

from __future__ import annotations

import math

import pytest
import torch

from reft_kernels.orthonormal import orthonormalize, reflector_base

pytestmark = pytest.mark.host("a refusal comes before anything is computed")
V, ROWS = torch.ones(4, 2), torch.eye(2, 4)
REFUSED = {
    "v-no-tensor": (TypeError, r"v must be a tensor .* got list", ([[1.0]],)),
    "v-vector": (ValueError, r"v must be \(…, D, r\).*got shape \(4,\)", (V[:, 0],)),
    "v-too-wide": (ValueError, r"1 ≤ r ≤ D, got shape \(2, 4\)", (ROWS,)),
    "v-no-columns": (ValueError, r"1 ≤ r ≤ D, got shape \(4, 0\)", (V[:, :0],)),
    "v-integer": (TypeError, "v must be float32 or float64, got torch.int64", (V.long(),)),
    "v-bfloat16": (TypeError, "v must be float32 .*bfloat16; convert", (V.bfloat16(),)),
    "base-no-tensor": (TypeError, "base must be a tensor or None, got int", (V, 1)),
    "base-shape": (ValueError, "base must have the shape of v", (V, V[None])),
    "base-dtype": (ValueError, "base must have the dtype of v", (V, V.double())),
    "base-device": (ValueError, "base must have the device of v", (V, V.to("meta"))),
    "base-gradient": (ValueError, "base must not require", (V, V.clone().requires_grad_())),
}
REFUSED_ROTATIONS = {
    "no-tensor": (TypeError, "rotation must be a tensor", (None,)),
    "vector": (ValueError, r"rotation must be \(…, r, D\).*got shape \(4,\)", (V[:, 0],)),
    "too-tall": (ValueError, r"1 ≤ r ≤ D, got shape \(4, 2\)", (V,)),
    "half": (TypeError, "rotation must be float32 or float64, got torch.float16", (ROWS.half(),)),
    "integer": (TypeError, "rotation must be float32 or float64", (ROWS.long(),)),
    "zero": (ValueError, r"max \|R Rᵀ − I\| at most 0.1; got 1$", (0 * ROWS,)),
    "not-normal": (ValueError, "orthonormal rows.*got 0.21$", (1.1 * ROWS,)),
    "not-orthogonal": (ValueError, "orthonormal rows.*got 1$", (ROWS[:1].expand(2, 4),)),
    "one-of-many": (ValueError, "orthonormal rows", (torch.stack([ROWS, 0 * ROWS]),)),
    "nan": (ValueError, "orthonormal rows.*got nan", (math.nan * ROWS,)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_orthonormalize_refuses(case: str) -> None:
    error, message, arguments = REFUSED[case]
    with pytest.raises(error, match=message):
        orthonormalize(*arguments)


@pytest.mark.parametrize("case", REFUSED_ROTATIONS)
def test_reflector_base_refuses(case: str) -> None:
    error, message, arguments = REFUSED_ROTATIONS[case]
    with pytest.raises(error, match=message):
        reflector_base(*arguments)
