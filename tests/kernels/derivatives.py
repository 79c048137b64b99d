"""Edits of a few rows in float64 and their derivatives of any order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reft_kernels import RowPlan, lowrank_edit, lowrank_edit_
from reft_kernels.devtools.testing import Case, laid_out, make_edit

TRITON = pytest.param("triton", marks=pytest.mark.interpreter("float64 is PyTorch's there"))
backends = pytest.mark.parametrize("backend", ["torch", TRITON])
NAMES = ("hidden", "encode", "bias", "decode")


def small(device, groups=(3, 0, 2), **fields):
    """A few rows in float64, one place of each group −1."""
    edit = make_edit(
        Case(5, 2, groups, "some", **{"dtype": torch.float64, "extra": 2, **fields}), device
    )
    return replace(edit, plan=RowPlan(edit.plan.rows, edit.plan.offsets))


def edited(edit, tensors, backend, inplace=False):
    """The edit with some of its tensors replaced, by name."""
    given = {name: getattr(edit, name) for name in NAMES} | tensors
    hidden = laid_out(given.pop("hidden") * 1, edit.layout)
    function = lowrank_edit_ if inplace else lowrank_edit
    return function(hidden, edit.plan, **given, **edit.options, backend=backend)


def derivatives(edit, live, backend, order, inplace=False, curved=True):
    """Gradients of a loss, of a loss of these, and so on: ``order`` lists, one after the other."""
    random = torch.Generator().manual_seed(3)
    leaves = {
        name: getattr(edit, name).clone().requires_grad_()
        for name in live
        if getattr(edit, name) is not None
    }
    out = edited(edit, leaves, backend, inplace)
    value = ((out.sin() if curved else out) * edit.upstream).sum()
    computed = []
    for _ in range(order):
        grads = torch.autograd.grad(
            value, list(leaves.values()), create_graph=True, materialize_grads=True
        )
        computed += [each.detach() for each in grads]
        weights = [torch.randn(each.shape, generator=random).to(each) for each in grads]
        value = sum((each.sin() * w).sum() for each, w in zip(grads, weights, strict=True))
        # In the graph, also where it is straight and has no more derivatives than these, 0.
        value = value + 0.0 * sum(leaf.sum() for leaf in leaves.values())
    return computed


def agree(computed, expected, tolerance=1e-11):
    assert len(computed) == len(expected)
    size = max(float(each.detach().abs().max()) for each in expected)
    for got, wanted in zip(computed, expected, strict=True):
        assert float((got - wanted).abs().max()) <= tolerance * size
