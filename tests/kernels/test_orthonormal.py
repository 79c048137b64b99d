"""V ↦ R against LAPACK's product of reflectors, dense matrices, and PyTorch's map.

All intermediate results are float64 and rounded once, so most budgets are a few float64 roundings.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.utils._python_dispatch import TorchDispatchMode

from reft_kernels.orthonormal import orthonormalize, reflector_base

EXACT = {"rtol": 0, "atol": 1e-13}  # float64; measured 3e-15

SHAPES = {
    "tall": (9, 4),
    "one-column": (7, 1),
    "square": (5, 5),
    "one-by-one": (1, 1),
    "batch": (2, 3, 8, 3),
    "no-layers": (0, 6, 2),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
bases = pytest.mark.parametrize("with_base", [False, True], ids=["no-base", "base"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation_of(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    """Random orthonormal rows (…, r, D) for a V of ``shape`` (…, D, r), of both orientations."""
    return torch.linalg.qr(normal(*shape, seed=seed))[0].mT.contiguous()


def problem(
    shape: tuple[int, ...],
    with_base: bool,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
):
    """Make V and a base with arbitrary values in the parts that are not read, and dR."""
    v, grad = normal(*shape, seed=2), normal(*shape, seed=3).mT.contiguous()
    base = None
    if with_base:
        base = reflector_base(rotation_of(shape))
        base = (base + 7 * torch.ones_like(base).triu(1)).to(device, dtype)
    return v.to(device, dtype).requires_grad_(), base, grad.to(device, dtype)


def computed(v: Tensor, base: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return (R, dL/dV) for dL/dR = grad without comparing: that would wait for the device."""
    rotation = orthonormalize(v, base)
    (d_v,) = torch.autograd.grad(rotation, v, grad)
    return rotation.detach(), d_v


def gradient(v: Tensor, base: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return (R, dL/dV) for dL/dR = grad, and check that the inputs are unchanged."""
    given = [t for t in (v, base, grad) if t is not None]
    before = [t.detach().clone() for t in given]
    result = computed(v, base, grad)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    return result


def dense(v: Tensor) -> Tensor:
    """Compute H(V) = H₁ ⋯ H_r, (…, D, D), factor by factor."""
    product = identity = torch.eye(v.shape[-2], dtype=v.dtype)
    for reflector in (v.tril(-1) + torch.eye(*v.shape[-2:], dtype=v.dtype)).unbind(-1):
        outer = reflector.unsqueeze(-1) * reflector.unsqueeze(-2)
        tau = 2 / reflector.square().sum(-1)[..., None, None]
        product = product @ (identity - tau * outer)
    return product


def identity_error(rotation: Tensor) -> float:
    rotation = rotation.detach().double()
    eye = torch.eye(rotation.shape[-2], dtype=torch.float64, device=rotation.device)
    return float((rotation @ rotation.mT - eye).abs().max())


@bases
@shapes
def test_is_the_product_of_reflectors(shape, with_base: bool, device) -> None:
    """Against LAPACK's product and PyTorch's gradient of it, on the CPU."""
    v, base, grad = problem(shape, with_base, torch.device("cpu"))
    below = v.tril(-1)
    expected = torch.linalg.householder_product(below, 2 / (1 + below.square().sum(-2)))
    if base is not None:
        expected = dense(base) @ expected * base.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    # The product leaves the graph where there is no matrix.
    wanted = {"allow_unused": True, "materialize_grads": True}
    (d_expected,) = torch.autograd.grad(expected.mT, v, grad, **wanted)
    rotation, d_v = gradient(*problem(shape, with_base, device))
    torch.testing.assert_close(rotation.cpu(), expected.mT, **EXACT)
    torch.testing.assert_close(d_v.cpu(), d_expected, **EXACT)


@bases
@pytest.mark.parametrize("shape", [(6, 3), (2, 4, 4), (3, 1)], ids=str)
def test_gradcheck(shape, with_base: bool, device) -> None:
    v, base, _ = problem(shape, with_base, device)
    torch.autograd.gradcheck(lambda x: orthonormalize(x, base), v, atol=1e-8, rtol=1e-6)


@bases
@shapes
def test_only_the_strictly_lower_part_counts(shape, with_base: bool, device) -> None:
    v, base, grad = problem(shape, with_base, device)
    rotation, d_v = gradient(v, base, grad)
    assert not d_v.triu().any() and (d_v.numel() <= 1 or d_v.any())
    clean, d_clean = gradient(v.detach().tril(-1).requires_grad_(), base, grad)
    assert torch.equal(rotation, clean) and torch.equal(d_v, d_clean)


SPECIAL = {
    "identity": torch.eye(3, 7),
    "minus-identity": -torch.eye(3, 7),
    "last-rows": torch.eye(7)[4:],
    "permutation": torch.eye(5)[[2, 0, 4, 1, 3]],
    "signed-permutation": torch.eye(4)[[1, 0, 3, 2]] * torch.tensor([1.0, -1, -1, 1]),
    "reflection": torch.tensor([[0.6, 0.8], [0.8, -0.6]]),
    "turn": torch.tensor([[0.6, 0.8], [-0.8, 0.6]]),
    "negative-entries": -torch.full((1, 4), 0.5),
    "minus-one": -torch.ones(1, 1),
    "near-identity": torch.linalg.qr(torch.eye(6, 3) + 1e-7 * torch.ones(6, 3))[0].mT,
}


def check_round_trip(rotation: Tensor, budget: float) -> None:
    base = reflector_base(rotation)
    assert base.shape == rotation.mT.shape and base.dtype == rotation.dtype
    assert base.is_contiguous() and not base.requires_grad
    assert (base.diagonal(dim1=-2, dim2=-1).abs() == 1).all() and not base.triu(1).any()
    assert base.numel() == 0 or base.abs().max() <= 1
    again = orthonormalize(torch.zeros_like(base), base)
    torch.testing.assert_close(again, rotation, rtol=0, atol=budget)


@shapes
def test_round_trip(shape, device) -> None:
    for seed in range(5):
        rotation = rotation_of(shape, seed).to(device)
        check_round_trip(rotation, 1e-14)
        check_round_trip(rotation.mT.contiguous().mT.requires_grad_(), 1e-14)
        check_round_trip(rotation.float(), 2e-7)  # measured 1e-7: R itself is rounded


@pytest.mark.parametrize("rotation", SPECIAL.values(), ids=SPECIAL.keys())
def test_round_trip_of_special_rotations(rotation: Tensor, device) -> None:
    check_round_trip(rotation.to(device), 2e-7)
    check_round_trip(torch.linalg.qr(rotation.double().mT)[0].mT.to(device), 1e-14)


def test_base_of_a_rotation_kept_in_bfloat16_is_orthonormal(device) -> None:
    stored = rotation_of((256, 8)).bfloat16().float().to(device)
    assert identity_error(stored) > 1e-4
    base = reflector_base(stored)
    rotation = orthonormalize(torch.zeros_like(base), base)
    assert identity_error(rotation) <= torch.finfo(torch.float32).eps
    torch.testing.assert_close(rotation, stored, rtol=0, atol=2 * identity_error(stored))


@bases
@pytest.mark.parametrize("scale", [0.0, 0.02, 1.0, 100.0, 1e6])
@pytest.mark.parametrize(("dim", "rank"), [(768, 4), (384, 32), (2048, 8), (32, 32)])
def test_rows_are_orthonormal_in_float32(dim, rank, scale, with_base: bool, device) -> None:
    """Entries that are rounded once move R Rᵀ by at most one rounding unit."""
    base = reflector_base(rotation_of((dim, rank)).float().to(device)) if with_base else None
    v = scale * normal(dim, rank, seed=4, dtype=torch.float32).to(device)
    assert identity_error(orthonormalize(v, base)) <= torch.finfo(torch.float32).eps


@pytest.fixture
def medium_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@bases
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.usefixtures("medium_precision")
def test_float32_is_float64_rounded_once_in_any_context(autocast, with_base: bool, device) -> None:
    v, base, grad = problem((2, 300, 6), with_base, device, torch.float32)
    wide = None if base is None else base.double()
    expected, d_expected = gradient(v.detach().double().requires_grad_(), wide, grad.double())
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        rotation, d_v = gradient(v, base, grad)
        again = reflector_base(rotation)
    assert rotation.dtype == d_v.dtype == torch.float32
    assert torch.equal(rotation, expected.float()) and torch.equal(d_v, d_expected.float())
    assert torch.equal(again, reflector_base(rotation))


@pytest.mark.parametrize("shape", [(9, 4), (5, 5), (6, 1)], ids=str)
@pytest.mark.parametrize("start", [0.0, 0.3], ids=["at-the-base", "away"])
def test_trains_like_the_parametrization_of_torch(shape, start: float, device) -> None:
    """R, gradient and AdamW steps agree, coordinate by coordinate, up to signs."""
    dim, rank = shape
    rotation, target = rotation_of(shape).to(device), normal(rank, dim, seed=5).to(device)
    base = reflector_base(rotation)
    signs = -base.diagonal()
    rows = torch.cat((signs, signs.new_ones(dim - rank)))

    def in_torch(values: Tensor) -> Tensor:
        return rows.unsqueeze(-1) * values * signs

    v = (start * normal(dim, rank, seed=6)).tril(-1).to(device).requires_grad_()
    # Its weight is Rᵀ, (D, r).
    module = nn.Linear(rank, dim, bias=False, dtype=torch.float64, device=device)
    orthogonal(module, orthogonal_map="householder")
    theirs = module.parametrizations.weight
    with torch.no_grad():
        theirs[0].base.copy_(dense(base.cpu()).to(device) * rows)  # the whole D × D matrix
        theirs.original.copy_(in_torch(v) - torch.eye(dim, rank, dtype=v.dtype, device=device))
    if start == 0:
        torch.testing.assert_close(module.weight.mT, rotation, **EXACT)

    optimizers = [torch.optim.AdamW([p], lr=0.05, weight_decay=0) for p in (v, theirs.original)]
    for _ in range(5):
        for matrix, optimizer in zip(
            (orthonormalize(v, base), module.weight.mT), optimizers, strict=True
        ):
            optimizer.zero_grad()
            (matrix - target).pow(4).sum().backward()
        torch.testing.assert_close(in_torch(v.grad), theirs.original.grad, rtol=0, atol=1e-10)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(orthonormalize(v, base), module.weight.mT, rtol=0, atol=1e-11)
    assert (orthonormalize(v, base) - rotation).abs().max() > 0.05


def test_weight_decay_leaves_r_orthonormal(device) -> None:
    rotation = rotation_of((3, 64, 4)).float().to(device)
    base, target = reflector_base(rotation), normal(3, 4, 64, dtype=torch.float32).to(device)
    v = torch.zeros_like(base, requires_grad=True)
    optimizer = torch.optim.AdamW([v], lr=0.05, weight_decay=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        (orthonormalize(v, base) - target).square().sum().backward()
        optimizer.step()
        assert identity_error(orthonormalize(v, base)) <= torch.finfo(torch.float32).eps
    assert (orthonormalize(v, base) - rotation).abs().max() > 0.1
    # Decay alone, down to the smallest numbers, leads back to the base point.
    torch.testing.assert_close(orthonormalize(v * 1e-30, base), rotation, rtol=0, atol=2e-7)


@bases
def test_every_batch_entry_is_its_own_problem_and_repeats(with_base: bool, device) -> None:
    v, base, grad = problem((2, 3, 20, 4), with_base, device)
    rotation, d_v = gradient(v, base, grad)
    again, d_again = gradient(v, base, grad)
    assert torch.equal(rotation, again) and torch.equal(d_v, d_again)  # bit for bit
    for index in ((0, 0), (1, 0), (1, 2)):
        entry = v.detach()[index].requires_grad_()
        alone, d_alone = gradient(entry, None if base is None else base[index], grad[index])
        torch.testing.assert_close(rotation[index], alone, **EXACT)
        torch.testing.assert_close(d_v[index], d_alone, **EXACT)


@bases
def test_strides_do_not_matter(with_base: bool, device) -> None:
    v, base, grad = problem((3, 12, 4), with_base, device, torch.float32)
    expected, d_expected = gradient(v, base, grad)
    strided = v.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    scattered = None if base is None else base.mT.contiguous().mT
    assert not strided.is_contiguous()
    rotation, d_v = gradient(strided, scattered, grad.mT.contiguous().mT)
    assert rotation.is_contiguous() and not orthonormalize(v.detach(), base).requires_grad
    assert torch.equal(rotation, expected) and torch.equal(d_v, d_expected)
    (d_sum,) = torch.autograd.grad(orthonormalize(v, base).sum(), v)  # dR is expanded
    assert torch.equal(d_sum, gradient(v, base, torch.ones_like(grad))[1])


@pytest.mark.host("tensors of the meta device")
@shapes
@bases
def test_meta_device_gives_shapes_without_reading_values(shape, with_base: bool) -> None:
    v = torch.empty(shape, device="meta", dtype=torch.float32, requires_grad=True)
    rotation = v.detach().mT
    base = reflector_base(rotation) if with_base else None
    assert base is None or (base.is_meta and base.shape == v.shape)
    out = orthonormalize(v, base)
    out.backward(torch.empty_like(out))
    assert out.is_meta and out.shape == rotation.shape and out.dtype == v.dtype
    assert v.grad is not None and v.grad.is_meta and v.grad.shape == v.shape


@pytest.mark.traced
@bases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_compiles_as_one_graph(with_base: bool, dtype: torch.dtype, device) -> None:
    v, base, grad = problem((2, 10, 3), with_base, device, dtype)
    expected, d_expected = gradient(v, base, grad)
    torch.compiler.reset()
    compiled = torch.compile(orthonormalize, fullgraph=True, backend="aot_eager")
    rotation = compiled(v, base)
    (d_v,) = torch.autograd.grad(rotation, v, grad)
    torch.testing.assert_close(rotation, expected, **EXACT)
    torch.testing.assert_close(d_v, d_expected, **EXACT)
    assert d_v.abs().max() > 0


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_nothing_is_square_in_the_width(device) -> None:
    dim, rank, layers = 500, 3, 2
    rotation = rotation_of((layers, dim, rank)).to(device)
    with Largest() as seen:
        base = reflector_base(rotation)
        v = torch.zeros_like(base, requires_grad=True)
        orthonormalize(v, base).sum().backward()
    assert layers * dim * rank <= seen.numel <= 2 * layers * dim * rank


def test_wide_models(device) -> None:
    rotation = rotation_of((60_000, 2)).float().to(device)
    base = reflector_base(rotation)
    v = torch.zeros_like(base, requires_grad=True)
    out = orthonormalize(v, base)
    out.square().sum().backward()
    torch.testing.assert_close(out, rotation, rtol=0, atol=2e-7)
    assert v.grad is not None and v.grad.abs().max() < 1e-6  # |R| is constant


@bases
def test_nothing_waits_for_the_device(with_base: bool, no_synchronisation, device) -> None:
    given = problem((4, 20, 6), with_base, device, torch.float32)
    with no_synchronisation():
        rotation, d_v = computed(*given)
    assert all(torch.equal(*pair) for pair in zip((rotation, d_v), gradient(*given), strict=True))


@pytest.mark.gpu("only the driver reports waits")
def test_on_a_gpu_without_waiting_for_it(device) -> None:
    expected, d_expected = gradient(*problem((4, 200, 6), True, torch.device("cpu"), torch.float32))
    there = problem((4, 200, 6), True, device, torch.float32)
    computed(*there)  # libraries start up
    torch.cuda.set_sync_debug_mode("error")
    try:
        rotation, d_v = computed(*there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(rotation.cpu(), expected, rtol=0, atol=6e-8)
    torch.testing.assert_close(d_v.cpu(), d_expected, rtol=2e-7, atol=1e-9)
    again = reflector_base(rotation).cpu()
    torch.testing.assert_close(again, reflector_base(expected), rtol=0, atol=3e-7)
