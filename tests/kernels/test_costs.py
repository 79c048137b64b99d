"""Costs of an edit: launches, saved bytes, waits for the device, 64-bit offsets."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from reft_kernels import FAMILY, RowPlan, autograd, lowrank_edit, lowrank_edit_
from reft_kernels.devtools.testing import Case, make_edit, run_edit
from reft_kernels.spec import EditWeights

backends = pytest.mark.parametrize("backend", ["torch", "triton"])
GROUPS = [(9,), (4, 5), (0, 3, 0, 1, 5), (1,) * 12]


# ------------------------------------------------------------------- launches


@pytest.mark.parametrize("rank", [3, 16])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("backend", ["triton"])
def test_one_forward_and_two_backward_launches_for_any_groups(backend, groups, rank, device, ran):
    run_edit(lowrank_edit_, make_edit(Case(33, rank, groups), device), backend=backend)
    assert ran == {
        "triton.edit_rows_kernel": 1,
        "triton.edit_rows_grad_kernel": 1,
        "triton.edit_params_grad_kernel": 1,
    }


@pytest.mark.parametrize("backend", ["triton"])
def test_a_gradient_that_is_not_requested_is_not_launched(backend, device, ran):
    edit = make_edit(Case(33, 3, (4, 5), member="lobireft"), device)
    lowrank_edit_(edit.hidden.clone(), edit.plan, None, edit.bias, edit.decode, backend=backend)
    assert ran == {"triton.edit_rows_kernel": 1}
    run_edit(lowrank_edit_, edit, wants=("hidden",), backend=backend)  # dh = v
    assert ran == {"triton.edit_rows_kernel": 2}
    run_edit(lowrank_edit_, edit, wants=("decode",), backend=backend)  # s is saved
    assert ran == {"triton.edit_rows_kernel": 3, "triton.edit_params_grad_kernel": 1}


# ------------------------------------------------------------------- saved for backward


@pytest.mark.parametrize("activation", [None, "gelu"], ids=["linear", "gelu"])
@pytest.mark.parametrize("member", FAMILY)
@backends
def test_nothing_of_the_size_of_hidden_is_saved(backend, member, activation, device):
    n, rank, dim, total = 9, 3, 64, 1000
    case = Case(dim, rank, (4, 5), "some", member=member, activation=activation, extra=total - n)
    edit = make_edit(case, device)
    saved: dict[int, int] = {}

    def note(tensor):
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    leaves = [
        None if value is None else value.clone().requires_grad_()
        for value in (edit.encode, edit.bias, edit.decode)
    ]
    hidden = edit.hidden.clone().requires_grad_() * 1
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        lowrank_edit_(hidden, edit.plan, *leaves, **edit.options, backend=backend)
    weights = 2 * 2 * rank * dim  # A and R of two groups
    coeffs = 2 * n * rank + 2 * 2 * rank  # s and u, and act(b) if there is no W
    assert 0 < sum(saved.values()) <= n * dim + coeffs + weights < total * dim // 10


@pytest.mark.parametrize(
    ("wants", "member", "rows"),
    [
        (("encode",), "loreft", True),
        (("decode",), "loreft", True),  # through A = W − R
        (("bias",), "direft", False),
        (("hidden",), "loreft", False),
        (("decode",), "direft", False),
    ],
)
@backends
def test_rows_are_saved_only_for_the_gradients_that_need_them(backend, wants, member, rows, device):
    edit = make_edit(Case(64, 3, (9,), member=member), device)
    shapes = []
    leaves = {
        name: getattr(edit, name).clone().requires_grad_(name in wants)
        for name in ("hidden", "encode", "bias", "decode")
    }
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append(t.shape) or t, lambda t: t
    ):
        lowrank_edit(plan=edit.plan, **leaves, **edit.options, backend=backend)
    assert ((9, 64) in shapes) == rows


# ------------------------------------------------------------------- no wait for the device


def unseen(edit):
    """Replace the plan by one whose largest row and −1 the host does not know, as on a device."""
    return replace(edit, plan=RowPlan(edit.plan.rows.clone(), edit.plan.offsets))


@pytest.mark.parametrize("activation", [None, "gelu"], ids=["linear", "gelu"])
@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.parametrize("backend", ["torch"])
def test_an_edit_and_its_gradient_never_wait(
    backend, member, activation, device, no_synchronisation
):
    """Only the torch backend is tested: Triton's interpreter reads tensors on the host."""
    case = Case(33, 3, (4, 0, 5), missing="some", member=member, activation=activation)
    edit = unseen(make_edit(case, device))
    with no_synchronisation():
        run_edit(lowrank_edit_, edit, backend=backend)


@pytest.mark.host("tensors of the meta device")
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed", "swapped"])
@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.parametrize("backend", ["torch"])
def test_an_edit_needs_no_value_of_any_tensor(backend, member, layout):
    """The meta device has no values, and refuses ``item``, ``tolist`` and every mask."""
    edit = unseen(make_edit(Case(33, 3, (4, 5), missing="some", member=member, layout=layout)))
    result = run_edit(lowrank_edit_, on_meta(edit), backend=backend)
    assert result.out.is_meta and result.out.shape == edit.hidden.shape
    assert result.grads["decode"].shape == edit.decode.shape


class Launched:
    """Stands for a kernel: records the grid, runs nothing."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: None


@pytest.mark.host("tensors of the meta device, in kernels that do nothing")
@pytest.mark.parametrize("activation", [None, "gelu"], ids=["linear", "gelu"])
@pytest.mark.parametrize("rank", [3, 16])
def test_the_launcher_needs_no_value_either(rank, activation, monkeypatch):
    """Host code of the kernels on the meta device, the kernels themselves replaced."""
    from reft_kernels._triton import launch

    names = [name for name in vars(launch) if name.endswith("_kernel")]
    kernels = {name: Launched() for name in names}
    for name, kernel in kernels.items():
        monkeypatch.setattr(launch, name, kernel)
    case = Case(33, rank, (4, 0, 5), missing="some", activation=activation)
    edit = on_meta(unseen(make_edit(case)))

    def straight(hidden, plan, encode, bias, decode, **options):
        weights = EditWeights(encode, bias, decode, **options)
        return autograd.edit(hidden, plan, weights, "triton", in_place=True)

    result = run_edit(straight, edit)
    assert all(result.grads[k].shape == getattr(edit, k).shape for k in result.grads)
    assert all(len(kernel.grids) == 1 for kernel in kernels.values())
    assert all(kernel.grids[0][1] == 3 for kernel in kernels.values()), (
        "one axis of a grid is groups"
    )


def on_meta(edit):
    names = ("hidden", "encode", "bias", "decode", "upstream")
    moved = {n: None if (t := getattr(edit, n)) is None else t.to("meta") for n in names}
    return replace(edit, plan=edit.plan.to("meta"), **moved)


# ------------------------------------------------------------------- offsets beyond 32 bits


@pytest.fixture
def vast(device, tmp_path):
    """Make a flat float16 tensor of zeros that is too large to fill: on the CPU a sparse file."""

    def zeros(size):
        if device.type == "cuda":
            if torch.cuda.mem_get_info()[0] < 10 * 2**30:
                pytest.skip("not run: needs 10 GiB of free memory on the GPU")
            return torch.zeros(size, dtype=torch.float16, device=device)
        path = tmp_path / "zeros"
        path.touch()
        os.truncate(path, size * 2)
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.float16)

    yield zeros
    if device.type == "cuda":
        torch.cuda.empty_cache()  # other processes test on this GPU as well


@pytest.mark.parametrize("strides", ["rows", "columns"])
@backends
def test_offsets_beyond_32_bits(backend, strides, device, vast):
    """8 GiB of float16 of which only edited rows are ever written, first as hidden, then as the
    upstream gradient. Offsets past 2³¹ elements turn negative in int32, and those past 2³² land on
    the first rows."""
    dim, total = 64, 2**32 // 64 + 100
    rows = [3, 2**31 // dim + 5, 2**32 // dim + 7]
    untouched = [0, 1, 2, 4, 5, 6, 7]
    if strides == "columns":  # (N, D) of strides (1, N): it is the column's offset that grows
        rows = [3, 70, total - 2]
    small = make_edit(Case(dim, 2, (3,), extra=0, dtype=torch.float16, member="direft"), device)
    small = replace(small, plan=RowPlan.from_rows([0, 1, 2]).to(device))
    expected = run_edit(lowrank_edit_, small, wants=("encode", "bias", "decode"), backend=backend)
    flat = vast(total * dim)
    # Not a view: autograd copies the gradient of the base of a view that is edited in place.
    stride = (dim, 1) if strides == "rows" else (1, total)
    hidden = flat.new_empty(0).set_(flat.untyped_storage(), 0, (total, dim), stride)
    del flat
    for index, row in enumerate(rows):
        hidden[row] = small.hidden[index]
    leaves = [p.clone().requires_grad_() for p in (small.encode, small.bias, small.decode)]
    plan = RowPlan.from_rows(rows).to(device)
    out = lowrank_edit_(hidden, plan, *leaves, **small.options, backend=backend)
    values = out.detach()
    assert torch.equal(values[rows], expected.out)
    assert not values[untouched].any()
    for index, row in enumerate(rows):
        values[row] = small.upstream[index]
    grads = torch.autograd.grad(out, leaves, values)
    assert not values[untouched].any()
    for name, grad in zip(("encode", "bias", "decode"), grads, strict=True):
        assert torch.equal(grad, expected.grads[name]), name
