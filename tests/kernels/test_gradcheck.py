"""Gradients against finite differences in float64, and random shapes against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_kernels import FAMILY, RowPlan, lowrank_edit, lowrank_edit_
from reft_kernels.devtools.testing import Case, budget, make_edit, run_edit

CHECKED = [
    ("torch", "loreft", None),
    ("torch", "loreft", "gelu"),
    ("torch", "direft", "silu"),
    ("torch", "consreft", None),
    ("torch", "lobireft", "tanh"),
    *(
        pytest.param("triton", *case, marks=pytest.mark.interpreter("float64 is PyTorch's there"))
        for case in (("loreft", None), ("loreft", "tanh"), ("direft", "gelu"), ("loreft", "silu"))
    ),
]


@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "inplace"])
@pytest.mark.parametrize(("backend", "member", "activation"), CHECKED)
def test_gradients_agree_with_finite_differences(backend, member, activation, inplace, device):
    """Two groups, one of them with a −1; hidden and every parameter at once."""
    case = Case(5, 2, (2, 2), member=member, activation=activation, dtype=torch.float64, extra=1)
    edit = make_edit(case, device)
    edit.plan.rows[1] = -1
    plan = RowPlan(edit.plan.rows, edit.plan.offsets)
    names = [n for n in ("hidden", "encode", "bias", "decode") if getattr(edit, n) is not None]

    def function(*tensors):
        given = dict.fromkeys(("hidden", "encode", "bias", "decode")) | dict(
            zip(names, tensors, strict=True)
        )
        hidden = given.pop("hidden")
        if inplace:
            return lowrank_edit_(hidden * 1, plan, **given, **edit.options, backend=backend)
        return lowrank_edit(hidden, plan, **given, **edit.options, backend=backend)

    tensors = tuple(getattr(edit, name).clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=backend == "triton", atol=1e-6)


@st.composite
def cases(draw):
    dim = draw(st.integers(1, 40))
    return Case(
        dim,
        draw(st.integers(1, min(dim, 20))),
        tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))),
        missing=draw(st.sampled_from(["none", "some", "all"])),
        member=draw(st.sampled_from(sorted(FAMILY))),
        activation=draw(st.sampled_from([None, "relu", "gelu", "silu", "tanh"])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        layout=draw(st.sampled_from(["contiguous", "sliced", "transposed", "swapped"])),
        extra=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize(("named", "examples"), [("torch", 120), ("triton", 40)])
def test_any_shape_stays_within_its_budget(named, examples, device, ran):
    if named == "triton" and device.type == "cuda":
        examples = 12  # each compiles up to three kernels

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(cases(), st.booleans())
    def check(case, inplace):
        judge = budget(make_edit(case, device))
        judge.check(run_edit(lowrank_edit_ if inplace else lowrank_edit, judge.edit, backend=named))

    check()
    assert sum(count for name, count in ran.items() if name.startswith(named)) > examples
