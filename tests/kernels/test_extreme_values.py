"""Extreme values and shapes: non-finite rows, overflow, denormal numbers, the smallest ranks and
widths, tensors beyond 2³¹ elements, thousands of steps, deterministic algorithms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reft_kernels import RowPlan, lowrank_edit, lowrank_edit_, orthonormalize, reflector_base
from reft_kernels.autograd import implementation
from reft_kernels.devtools.testing import Case, make_edit, run_edit, same_bits
from reft_kernels.spec import EditWeights, Wanted

BACKENDS = ["torch", "triton", "reference"]
NOT_FINITE = [float("nan"), float("inf")]
backends = pytest.mark.parametrize("backend", BACKENDS)
CASES = [
    Case(65, 3, (4, 5), missing="some"),
    Case(64, 16, (9,), missing="some", activation="gelu"),
    Case(64, 2, (0, 9), missing="some", member="consreft", dtype=torch.bfloat16),
    Case(33, 1, (3, 2), missing="all", member="direft", dtype=torch.float16),
]


def rest_of(count: int, row: int) -> torch.Tensor:
    return torch.tensor([at for at in range(count) if at != row])


@backends
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("function", [lowrank_edit, lowrank_edit_])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_unedited_row_affects_nothing(case, function, value, backend, device):
    """The row is row 0, which a −1 must not read: 0 · NaN is NaN."""
    edit = make_edit(case, device)
    row = 0 if 0 in edit.unnamed else int(edit.unnamed[0])
    if row != 0:  # move the plan's row 0 to another row
        swapped = torch.where(edit.plan.rows == 0, row, edit.plan.rows)
        plan = RowPlan(swapped, edit.plan.offsets, max_row=None)
        edit, row = replace(edit, plan=plan), 0
    hidden, upstream = edit.hidden.clone(), edit.upstream.clone()
    hidden[row], upstream[row] = value, value
    expected = run_edit(function, edit, backend=backend)
    result = run_edit(function, replace(edit, hidden=hidden, upstream=upstream), backend=backend)
    rest = rest_of(hidden.shape[0], row).to(device)
    assert same_bits(result.out[rest], expected.out[rest])
    assert same_bits(result.out[row], hidden[row])
    for name, grad in expected.grads.items():
        actual = result.grads[name]
        if grad is None:
            continue
        if name == "hidden":
            grad, actual = grad[rest], actual[rest]
        assert same_bits(actual, grad), name


@backends
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_an_edited_row_stays_in_its_row(case, value, backend, device):
    edit = make_edit(case, device)
    row = int(edit.live[1])
    hidden = edit.hidden.clone()
    hidden[row, 3] = value
    expected = run_edit(lowrank_edit, edit, backend=backend)
    result = run_edit(lowrank_edit, replace(edit, hidden=hidden), backend=backend)
    rest = rest_of(hidden.shape[0], row).to(device)
    assert same_bits(result.out[rest], expected.out[rest])
    assert not result.out[row].isfinite().all()
    assert same_bits(result.grads["hidden"][rest], expected.grads["hidden"][rest])


@backends
@pytest.mark.parametrize("value", NOT_FINITE)
def test_entries_of_tables(value, backend, device):
    """A group without an entry and one scaled by 0, next to non-finite rows and entries."""
    edit = make_edit(Case(64, 3, (3, 3, 3)), device)
    rows = torch.tensor([2, 3, 4, 5, -1, 6, 7, 8, -1], device=device)
    scales = torch.tensor([0.0, 2.0, 1.0], device=device)
    plan = RowPlan(rows, (0, 3, 6, 9)).using(torch.tensor([1, 0, -1], device=device), scales)
    hidden, decode = edit.hidden.clone(), edit.decode.clone()
    args = (edit.encode, edit.bias)
    expected = lowrank_edit(hidden, plan, *args, decode, **edit.options, backend=backend)
    hidden[0], hidden[7], decode[2] = value, value, value
    result = lowrank_edit(hidden, plan, *args, decode, **edit.options, backend=backend)
    rest = torch.tensor([at for at in range(hidden.shape[0]) if at not in (0, 7)], device=device)
    assert same_bits(result[rest], expected[rest])
    assert same_bits(result[[0, 7]], hidden[[0, 7]])
    assert torch.equal(result[2:5], hidden[2:5])  # times 0


@backends
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_float16_overflows_where_the_result_is_too_large(backend, device):
    """Coefficients may leave float16's range. (bfloat16 has the range of the float32 sums.)"""
    dtype = torch.float16
    edit = make_edit(Case(64, 4, (6,), dtype=dtype), device)
    largest = torch.finfo(dtype).max
    scale = largest / edit.hidden.abs().max().double()
    for share in (0.2, 0.999):
        hidden = (edit.hidden.double() * scale * share).to(dtype)
        args = (edit.encode, edit.bias, edit.decode)
        wide = (tensor.double() for tensor in args)
        exact = lowrank_edit(hidden.double(), edit.plan, *wide, **edit.options, backend="reference")
        out = lowrank_edit(hidden, edit.plan, *args, **edit.options, backend=backend)
        over = exact.to(dtype).isinf()
        # Within the error of float32 sums around the limit, both results are right.
        near = (exact.abs() / largest - 1).abs() < 1e-3
        assert torch.equal(out.isinf() | near, over | near)
        assert not out.isnan().any()
        fine = ~(over | near)
        bound = largest * 2e-3
        torch.testing.assert_close(out[fine].double(), exact[fine], rtol=2e-3, atol=bound)
    assert over.any()


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_smallest_numbers_are_kept(dtype, backend, device):
    """Denormal entries keep their values in rows that R = 0 edits and in unedited rows."""
    tiny = torch.finfo(dtype).smallest_normal
    edit = make_edit(Case(64, 3, (5,), missing="some", dtype=dtype), device)
    hidden = (edit.hidden.double() * tiny / 8).to(dtype)
    assert ((hidden != 0) & (hidden.abs() < tiny)).any()
    zero = torch.zeros_like(edit.decode)
    out = lowrank_edit(hidden, edit.plan, zero, edit.bias, zero, backend=backend)
    # The interpreter's own conversion to bfloat16 flushes them to a neighbour or 0, and cuBLAS may
    # flush denormal float32 numbers.
    interpreted = backend == "triton" and device.type == "cpu" and dtype is torch.bfloat16
    blas = backend == "torch" and device.type == "cuda" and dtype is not torch.float16
    if interpreted or blas:
        assert float((out.double() - hidden.double()).abs().max()) <= tiny
        out[edit.live] = hidden[edit.live]
    assert torch.equal(out, hidden)


# -------------------------------------------------------------------- the smallest shapes


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (7, 1), (16, 16)], ids=str)
@pytest.mark.parametrize("based", [False, True])
def test_orthonormal_rows_of_every_shape(shape, based, device):
    dim, rank = shape
    v = torch.randn(2, dim, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v = v.to(device)
    base = None
    if based:
        frame = torch.linalg.qr(v.flip(1))[0].mT
        base = reflector_base(frame)
        assert torch.allclose(orthonormalize(torch.zeros_like(base), base), frame)
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        cast_base = None if base is None else base.to(dtype)
        rotation = orthonormalize(v.to(dtype), cast_base)
        eye = torch.eye(rank, dtype=dtype, device=device)
        assert float((rotation @ rotation.mT - eye).abs().max()) < close
    leaf = v.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: orthonormalize(x, base), leaf)


# -------------------------------------------------------------------- more than 2³¹ elements


BEYOND = 2**31


def both_ways(kernels, hidden, plan, edit):
    """Edit ``hidden`` in place, then use it as an upstream gradient and write dh into it."""
    parameters = (tensor.unsqueeze(0) for tensor in (edit.encode, edit.bias, edit.decode))
    weights = EditWeights(*parameters, subtract=True)
    saved = kernels.edit_forward(hidden, plan, weights, save_rows=True, save_coeffs=True)
    wanted = Wanted(True, True, True, True)
    _, *grads = kernels.edit_backward(hidden, plan, weights, saved, wanted, overwrite=True)
    return grads


@pytest.mark.interpreter("a sparse file; test_costs has offsets beyond 32 bits on a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_beyond_two_to_the_31_elements(backend, tmp_path):
    """The tensor is a sparse file, of which only the edited rows exist."""
    dim, count = 4096, BEYOND // 4096 + 4
    file = tmp_path / "hidden"
    with file.open("wb") as stream:
        stream.truncate(count * dim * 2)
    hidden = torch.from_file(str(file), shared=True, size=count * dim, dtype=torch.float16)
    hidden = hidden.view(count, dim)
    rows = [3, count - 1, count - 3]
    edit = make_edit(Case(dim, 2, (3,), dtype=torch.float16, extra=0))
    hidden[rows] = edit.hidden
    small = edit.hidden.clone()
    big_plan, small_plan = RowPlan.from_rows(rows), RowPlan.from_rows([0, 1, 2])
    actual = both_ways(implementation(backend), hidden, big_plan, edit)
    expected = both_ways(implementation(backend), small, small_plan, edit)
    assert same_bits(hidden[rows], small)
    assert not same_bits(small, edit.hidden)
    assert all(map(same_bits, actual, expected))
    # A row number that overflows 32 bits would have landed here.
    assert not hidden[:3].any()
    assert not hidden[count - 2].any()
    assert file.stat().st_blocks * 512 < 2**20


@pytest.mark.host("tensors of the meta device")
def test_shapes_beyond_two_to_the_31_elements():
    meta = {"device": "meta", "dtype": torch.float32}
    v = torch.empty(80, 2, 16384, 1024, **meta)
    assert v.numel() > BEYOND
    rotation = orthonormalize(v, torch.empty_like(v))
    assert rotation.shape == (80, 2, 1024, 16384)
    hidden = torch.empty(BEYOND // 4096 + 8, 4096, device="meta", dtype=torch.bfloat16)
    plan = RowPlan(torch.empty(5, dtype=torch.int64, device="meta"), (0, 5))
    parts = [torch.empty(shape, **meta) for shape in ((8, 4096), (8,), (8, 4096))]
    out = lowrank_edit(hidden, plan, *parts, backend="torch")
    assert out.shape == hidden.shape


# -------------------------------------------------------------------- thousands of steps


@pytest.mark.host("steps of forty small launches, the same on the CPU")
def test_thousands_of_steps_keep_the_rows_orthonormal():
    """AdamW updates one rotation and SGD another, in one batch."""
    random = torch.Generator().manual_seed(0)
    start = torch.linalg.qr(torch.randn(2, 64, 8, generator=random))[0].mT.contiguous()
    base = reflector_base(start)
    adapted, plain = (torch.zeros(64, 8).requires_grad_() for _ in range(2))
    optimizers = (
        torch.optim.AdamW([adapted], lr=0.1, weight_decay=0.1),
        torch.optim.SGD([plain], lr=10.0, momentum=0.9),
    )
    eye, worst = torch.eye(8), 0.0
    target = torch.randn(2, 8, 64, generator=random)
    for step in range(3_000):
        rotation = orthonormalize(torch.stack([adapted, plain]), base)
        if step % 50 == 0:
            worst = max(worst, float((rotation @ rotation.mT - eye).detach().abs().max()))
            target = torch.randn(2, 8, 64, generator=random) * (1 + step % 7)
        rotation.backward(target)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert worst < 1e-5
    free = torch.stack([adapted, plain]).detach()
    assert free.isfinite().all()
    assert ((orthonormalize(free, base) - start).abs().amax((1, 2)) > 0.1).all()


# -------------------------------------------------------------------- deterministic algorithms


@backends
@pytest.mark.parametrize("case", CASES, ids=str)
def test_deterministic_algorithms(case, backend, device):
    edit = make_edit(case, device)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run_edit(lowrank_edit_, edit, backend=backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_bits(first.out, second.out)
    for name, grad in first.grads.items():
        assert grad is None or same_bits(grad, second.grads[name])
