"""The gate passes correct operators and rejects wrong ones, in float32 and bfloat16."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import OpCase
from benchmarks.gate import OpGate, check_losses, result_of
from benchmarks.peers import Operator, ours, reference
from benchmarks.suites.op import Workload, tensors
from reft_kernels import lowrank_edit

CPU = torch.device("cpu")


def checked(case, operator, edit):
    workload = Workload(operator, edit.hidden, edit.upstream)
    return OpGate(case, edit).check(
        result_of(*workload.result()), within_budget=operator.within_budget
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_correct_operators_pass(dtype, groups):
    case = OpCase("f7+l7", 2, 32, 64, 4, dtype, groups)
    edit = tensors(case, CPU)
    for operator in (
        ours.edit("auto", case, edit),
        reference.edit(False, case, edit),
        Operator(_plain(edit), {}, within_budget=False),
    ):
        assert checked(case, operator, edit).passed


def _plain(edit, scale=1.0):
    def call(hidden):
        bias = edit.bias * scale
        return lowrank_edit(hidden, edit.plan, edit.encode, bias, edit.decode, subtract=True)

    return call


@pytest.mark.parametrize("within_budget", [True, False])
def test_a_wrong_output_is_rejected(within_budget):
    case = OpCase("f7+l7", 2, 32, 64, 4)
    edit = tensors(case, CPU)
    wrong = Operator(_plain(edit, scale=1.01), {}, within_budget=within_budget)
    gate = checked(case, wrong, edit)
    assert not gate.passed and "out" in gate.says


def test_a_wrong_gradient_is_rejected():
    case = OpCase("f7+l7", 2, 32, 64, 4)
    edit = tensors(case, CPU)
    right = ours.edit("auto", case, edit)

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.001 * grad

    wrong = Operator(lambda hidden: right.call(Doubled.apply(hidden)), right.leaves)
    gate = checked(case, wrong, edit)
    assert not gate.passed and "hidden 1.0e-03" in gate.says


def test_transposed_and_foreign_gradients():
    grads = {
        "hidden": torch.ones(2),
        "decode.T": torch.arange(6.0).view(3, 2),
        "free": torch.ones(1),
    }
    renamed = result_of(torch.zeros(2), grads).grads
    assert torch.equal(renamed["decode"], torch.arange(6.0).view(3, 2).T)
    assert renamed["encode"] is None and set(renamed) == {"hidden", "encode", "bias", "decode"}


def test_losses():
    assert check_losses(1.0, 1.0 + 1e-6, torch.float32).passed
    assert not check_losses(1.0, 1.001, torch.float32).passed
    assert check_losses(1.0, 1.001, torch.bfloat16).passed
    assert not check_losses(float("nan"), 1.0, torch.float32).passed
