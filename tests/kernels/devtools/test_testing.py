"""The tools that judge the kernels fail when they should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reft_kernels import RowPlan, lowrank_edit
from reft_kernels.devtools import testing as apparatus
from reft_kernels.devtools.testing import (
    Budget,
    Case,
    budget,
    count_paths,
    make_edit,
    poisoned_memory,
    relative_error,
    run_edit,
    same_bits,
)

CASE = Case(65, 3, (4, 5), missing="some")


@pytest.fixture
def judged(device) -> tuple[Budget, apparatus.Result]:
    edit = make_edit(CASE, device)
    return budget(edit), run_edit(lowrank_edit, edit, backend="torch")


def test_a_right_result_passes(judged):
    judge, result = judged
    judge.check(result)


@pytest.mark.parametrize("name", ["encode", "bias", "decode"])
def test_a_gradient_off_by_a_thousandth_fails(judged, name):
    judge, result = judged
    wrong = result.grads | {name: result.grads[name] * 1.001}
    with pytest.raises(AssertionError, match=name):
        judge.check(replace(result, grads=wrong))


@pytest.mark.parametrize("value", [1e-3, float("nan"), float("inf")])
def test_one_wrong_element_of_an_edited_row_fails(judged, value):
    judge, result = judged
    out = result.out.clone()
    out[judge.edit.live[1], 5] += value
    with pytest.raises(AssertionError, match="out: error"):
        judge.check(replace(result, out=out))


def test_one_flipped_bit_of_an_unnamed_row_fails(judged):
    judge, result = judged
    out = result.out.clone()
    element = out[judge.edit.unnamed[-1], :1]
    element.copy_(torch.nextafter(element, torch.full_like(element, 9.0)))
    with pytest.raises(AssertionError, match="outside the plan"):
        judge.check(replace(result, out=out))


def test_a_gradient_where_none_belongs_fails(device):
    judge = budget(make_edit(replace(CASE, missing="all"), device))
    result = run_edit(lowrank_edit, judge.edit, backend="torch")
    judge.check(result)
    with pytest.raises(AssertionError, match="bias: error"):
        wrong = torch.full((2, 3), 1e-30, device=device)
        judge.check(replace(result, grads=result.grads | {"bias": wrong}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_budgets_are_a_few_rounding_steps(dtype, device):
    allowed = budget(make_edit(replace(CASE, dtype=dtype), device)).allowed
    assert set(allowed) == {"out", "hidden", "encode", "bias", "decode"}
    step = torch.finfo(dtype).eps
    assert all(step / 2 <= bound < 20 * step for pair in allowed.values() for bound in pair)


def test_relative_error_is_infinite_for_nan_and_for_anything_beside_zero(device):
    def error(actual, exact):
        return relative_error(
            torch.tensor(actual, device=device), torch.tensor(exact, device=device)
        )

    infinite = (float("inf"), float("inf"))
    assert error([3.0, 4.5], [3.0, 4.0]) == (0.1, 0.125)
    assert error([0.0, float("nan")], [3.0, 4.0]) == infinite
    assert error([1e-9], [0.0]) == infinite
    assert error([0.0, 0.0], [0.0, 0.0]) == (0.0, 0.0)


def test_same_bits_tells_zeros_and_nans_apart(device):
    zero, nan = (torch.tensor([value], device=device) for value in (0.0, float("nan")))
    assert same_bits(nan, nan.clone()) and not same_bits(zero, -zero)
    assert not same_bits(zero, zero.double()) and not same_bits(zero, zero.expand(2))


@pytest.mark.host("patches functions of PyTorch, independent of the device")
def test_poison_reaches_the_named_package_only(monkeypatch):
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    source = "import torch\ndef make(): return torch.empty(2), torch.empty_like(x), x.new_empty(3)"
    ours = {"__name__": "reft_kernels.some", "x": torch.ones(1)}
    others = {"__name__": "reft.other", "x": torch.ones(1)}
    exec(source, ours)
    exec(source, others)
    with poisoned_memory():
        assert all(made.isnan().all() for made in ours["make"]())
        assert all((made == 0).all() for made in others["make"]())
    assert all((made == 0).all() for made in ours["make"]())


def test_every_path_is_counted(device):
    edit = make_edit(CASE, device)
    for backend, expected in (
        ("reference", {"reference.lowrank_edit": 1}),
        ("torch", {"torch.edit_forward": 1, "torch.edit_backward": 1}),
    ):
        with count_paths() as counts:
            run_edit(lowrank_edit, edit, backend=backend)
        assert counts == expected
    with count_paths() as counts:
        run_edit(lowrank_edit, edit, backend="triton")
    assert {name.split(".")[0] for name in counts} == {"triton"}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: bool(x.any()),
    ],
    ids=["item", "nonzero", "mask", "unique", "bool"],
)
def test_waiting_for_the_device_is_detected(wait, no_synchronisation, device):
    values = torch.tensor([1, 2], device=device)
    with pytest.raises(AssertionError, match="wait"), no_synchronisation():
        wait(values)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed", "swapped"])
def test_layouts_hold_the_values_they_were_given(layout, device):
    values = torch.randn((2, 3, 5) if layout == "swapped" else (6, 5), device=device)
    placed = apparatus.laid_out(values, layout)
    assert torch.equal(placed, values) and placed.data_ptr() != values.data_ptr()
    assert placed.is_contiguous() == (layout == "contiguous")


def test_a_case_makes_the_edit_that_its_name_describes(device):
    edit = make_edit(Case(64, 2, (3, 0, 4), missing="some", member="consreft"), device)
    assert edit.hidden.device.type == edit.plan.device.type == device.type
    assert edit.plan.offsets == (0, 3, 3, 7) and edit.encode is None and edit.options["subtract"]
    assert (edit.plan.rows < 0).sum() > 1 and len(edit.live) + len(edit.unnamed) == 13
    assert isinstance(edit.plan, RowPlan) and str(CASE) == "loreft-D65-r3-n4+5-fp32-missing-some"
