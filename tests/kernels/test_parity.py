"""Outputs and every gradient against float64, within the error budget, for every backend, in place
and out of place, on one list of cases."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from reft_kernels import FAMILY, lowrank_edit, lowrank_edit_
from reft_kernels.activations import ACTIVATIONS, TRITON_ACTIVATIONS
from reft_kernels.devtools.testing import Budget, Case, budget, make_edit, run_edit

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

#: Every member with fp32 parameters, for hidden in fp32 and bf16.
MEMBERS = [
    Case(100, 3, (4, 5), missing="some", member=member, dtype=dtype)
    for member in FAMILY
    for dtype in (FP32, BF16)
]
#: float16; parameters in hidden's dtype; float64, which only the interpreter and PyTorch compute.
DTYPES = [
    Case(65, 2, dtype=FP16),
    Case(65, 16, dtype=FP16),
    Case(64, 16, dtype=BF16),
    Case(65, 2, dtype=BF16, parameters=BF16),
    Case(64, 20, (5, 6), dtype=BF16, parameters=BF16, member="direft"),
    Case(65, 2, dtype=FP16, parameters=FP16, activation="gelu"),
    Case(65, 4, (3, 4), missing="some", dtype=FP64),
    Case(64, 20, dtype=FP64, activation="tanh"),
    Case(65, 2, dtype=FP64, parameters=FP32, member="direft"),
]
#: D below, at and above a power of two, up to that of 13B models. r at the boundary between FMA and
#: the matrix units, at the padding of both, at D itself, and above 128.
SHAPES = [
    Case(64, 1),
    Case(64, 64, (3,)),
    Case(65, 1),
    Case(65, 2, (4, 4)),
    Case(65, 40, (20, 20), missing="some", activation="gelu", dtype=BF16),
    Case(257, 8, (3, 2)),
    Case(257, 9, (3, 2)),
    Case(768, 16, (17,)),
    Case(768, 33, (3,)),
    Case(768, 4, (9,), dtype=BF16),
    Case(4096, 4, (2, 1)),
    Case(4096, 8, (3,), dtype=BF16),
    Case(5120, 16, (2,)),
    Case(257, 200, (2,)),
    Case(300, 64, (18,), dtype=BF16),
    Case(2, 2, (1,)),
    Case(1, 1, (3,)),
]
#: One row; tiles that end early; empty, equal, skewed, many groups.
GROUPS = [
    Case(40, 2, (1300,), missing="some"),  # tiles of 16 rows for fewer than 8 ranks
    Case(40, 1, (700, 600)),
    Case(64, 4, (1,)),
    Case(64, 4, (45,), missing="some"),
    Case(64, 4, (3, 8)),
    Case(64, 4, (0, 4, 0, 9, 1), missing="some"),
    Case(64, 12, (0, 17, 0, 1, 33), missing="some"),
    Case(64, 3, (4, 4, 4, 4, 4)),
    Case(8, 4, (1,) * 64),
    Case(8, 1, tuple((9, 7, 0, 2, 1)[min(k, 4)] for k in range(64)), missing="some"),
]
#: Only −1, in every kind of launch.
MISSING = [
    Case(64, 4, (5,), missing="all"),
    Case(64, 16, (20, 3), missing="all", dtype=BF16),
    Case(64, 4, (5, 2), missing="all", activation="silu"),
    Case(64, 4, (7,), extra=0),
]
#: Rows with a stride, columns with a stride, and rows without a common stride.
LAYOUTS = [
    Case(65, 4, (4, 3), missing="some", layout=layout, dtype=dtype)
    for layout in ("sliced", "transposed", "swapped")
    for dtype in (FP32, BF16)
] + [Case(64, 16, (5,), layout="transposed"), Case(65, 4, (5,), layout="sliced", activation="relu")]
#: With an activation σ cannot be folded. Without W the activation's result is constant.
ACTIVE = [
    Case(65, 4, (5, 4), missing="some", member=member, activation=name)
    for member in ("loreft", "direft")
    for name in sorted(TRITON_ACTIVATIONS)
] + [
    Case(100, 16, (5,), activation="gelu", dtype=BF16),
    Case(100, 16, (5, 2), activation="relu", missing="some"),
    Case(65, 2, member="consreft", activation="tanh"),
    Case(65, 2, member="lobireft", activation="silu"),
]
UNBIASED = [
    Case(65, 4, (4, 3), missing="some", biased=False),
    Case(65, 4, biased=False, activation="gelu"),
    Case(65, 12, member="consreft", biased=False),
]
#: More than 2048 rows, several chunks of columns and several tiles of rows for each program: cases
#: that the interpreter computes in seconds.
MANY = [
    (Case(200, 8, (2100,), dtype=BF16, missing="some"), "inplace"),
    (Case(136, 32, (2060, 40), dtype=FP16), "apart"),
    (Case(72, 32, (2100,), missing="some"), "inplace"),
]
#: The same at the widths of models, with the minutes that the interpreter would take.
WIDE = [
    (1, Case(2048, 8, (2100,), dtype=BF16), "apart"),
    (1, Case(2048, 32, (2060, 40), dtype=BF16, missing="some"), "inplace"),
    (2, Case(4096, 32, (2100,), missing="some"), "inplace"),
    (4, Case(2048, 8, (8192,), dtype=FP16), "inplace"),
    (5, Case(2048, 32, (8192,), dtype=BF16), "inplace"),
    (7, Case(4096, 8, (8192,), dtype=BF16, missing="some"), "inplace"),
    (9, Case(4096, 32, (4096, 4096), dtype=BF16), "apart"),
]
PLACES = {"apart": lowrank_edit, "inplace": lowrank_edit_}
CASES = (*MEMBERS, *DTYPES, *SHAPES, *GROUPS, *MISSING, *LAYOUTS, *ACTIVE, *UNBIASED)


@functools.lru_cache(maxsize=8)
def judge_of(case: Case, device: torch.device) -> Budget:
    return budget(make_edit(case, device))


#: Cases that Triton also runs out of place. That differs from in place by a clone only, so other
#: cases run once in the slow interpreter.
TWICE = {*MEMBERS, *DTYPES, *MISSING, *LAYOUTS}


RUNS = [
    pytest.param(case, backend, place, id=f"{case}-{backend}-{place}")
    for case in CASES
    for backend in ("torch", "triton")
    for place in PLACES
    if place == "inplace" or backend == "torch" or case in TWICE
]


@pytest.mark.parametrize(("case", "backend", "place"), RUNS)
def test_edit(case, backend, place, device):
    if backend == "triton" and FP64 in (case.dtype, case.parameters) and device.type == "cuda":
        pytest.skip("not run: float64 is PyTorch's on a GPU")
    judge = judge_of(case, device)
    judge.check(run_edit(PLACES[place], judge.edit, backend=backend))


@pytest.mark.parametrize(
    ("case", "place"),
    [
        *(pytest.param(*run, id=f"{run[0]}-{run[1]}") for run in MANY),
        *(
            pytest.param(
                case,
                place,
                id=f"{case}-{place}",
                marks=pytest.mark.gpu(f"the interpreter takes about {minutes} min"),
            )
            for minutes, case, place in WIDE
        ),
    ],
)
@pytest.mark.parametrize("backend", ["triton"])
def test_many_rows(case, place, backend, device):
    """Budgets are not cached by ``judge_of``: these take up to 1 GiB, and 3 GiB while computed."""
    judge = budget(make_edit(case, device))
    judge.check(run_edit(PLACES[place], judge.edit, backend=backend))


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - TRITON_ACTIVATIONS))
@pytest.mark.parametrize("backend", ["torch"])
def test_activations_of_the_torch_backend(activation, backend, device):
    judge = budget(make_edit(Case(65, 4, (5, 4), missing="some", activation=activation), device))
    judge.check(run_edit(lowrank_edit, judge.edit, backend=backend))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("backend", ["reference"])
def test_reference_as_a_backend(backend, place, device):
    judge = budget(make_edit(Case(65, 4, (5, 4), missing="some", dtype=BF16), device))
    judge.check(run_edit(PLACES[place], judge.edit, backend=backend))


WANTS = [
    ("hidden",),
    ("encode",),
    ("bias",),
    ("decode",),
    ("encode", "bias", "decode"),
    ("hidden", "bias"),
    ("hidden", "decode"),
]


@pytest.mark.parametrize("wants", WANTS, ids="+".join)
@pytest.mark.parametrize("activation", [None, "relu"], ids=["linear", "relu"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_requested_one_by_one(wants, activation, backend, device):
    """Each gradient is independent of which others are requested."""
    judge = judge_of(Case(65, 3, (4, 0, 5), missing="some", activation=activation), device)
    for function in (lowrank_edit, lowrank_edit_):
        result = run_edit(function, judge.edit, wants=wants, backend=backend)
        assert {name for name, grad in result.grads.items() if grad is not None} == set(wants)
        judge.check(result)


@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("rank", [3, 16])
@pytest.mark.parametrize("backend", ["triton"])
def test_the_rows_of_a_gradient_may_be_split_among_programs(
    backend, rank, splits, device, monkeypatch
):
    """Only many rows are split by rule. Here few rows are, so that some splits are empty."""
    from reft_kernels._triton import launch

    chosen = launch.choose
    monkeypatch.setattr(
        launch, "choose", lambda *args, **kw: replace(chosen(*args, **kw), splits=splits)
    )
    judge = judge_of(Case(65, rank, (1, 37, 0, 14), missing="some", activation="relu"), device)
    judge.check(run_edit(lowrank_edit_, judge.edit, backend=backend))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rank", [2, 16])
def test_parameters_need_not_be_contiguous(backend, rank, device):
    judge = judge_of(Case(66, rank, (4, 5)), device)
    edit = judge.edit
    strided = replace(
        edit,
        encode=edit.encode.mT.contiguous().mT,
        bias=edit.bias.T.contiguous().T,
        decode=torch.stack([edit.decode, edit.decode], -1)[..., 0],
    )
    assert not any(p.is_contiguous() for p in (strided.encode, strided.bias, strided.decode))
    judge.check(run_edit(lowrank_edit, strided, backend=backend))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_upstream_need_not_be_contiguous(backend, device):
    """The gradient of a sum has strides 0, that of a transposition is transposed."""
    case = Case(65, 3, (4, 5), missing="some")
    edit = make_edit(case, device)
    for upstream in (
        torch.ones(1, device=device).expand(edit.hidden.shape),
        edit.upstream.T.contiguous().T,
        edit.upstream[0].expand(edit.hidden.shape),
    ):
        judge = budget(replace(edit, upstream=upstream.contiguous()))
        judge.check(run_edit(lowrank_edit, replace(edit, upstream=upstream), backend=backend))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_group_may_be_written_without_its_dimension(backend, device):
    edit = make_edit(Case(65, 3, (6,)), device)
    stacked = replace(
        edit, encode=edit.encode[None], bias=edit.bias[None], decode=edit.decode[None]
    )
    flat = run_edit(lowrank_edit, edit, backend=backend)
    deep = run_edit(lowrank_edit, stacked, backend=backend)
    assert torch.equal(flat.out, deep.out)
    for name in ("encode", "bias", "decode"):
        assert torch.equal(flat.grads[name][None], deep.grads[name])


@pytest.mark.parametrize("shape", [(65,), (9, 65), (3, 3, 65), (1, 3, 1, 3, 65)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_leading_shapes_are_only_rows(shape, backend, device):
    edit = make_edit(Case(65, 2, (1,), extra=8), device)
    if shape == (65,):
        edit = replace(edit, plan=edit.plan.from_rows([0]).to(device), hidden=edit.hidden[:1])
    args = (edit.plan, edit.encode, edit.bias, edit.decode)
    expected = lowrank_edit(edit.hidden, *args, subtract=True, backend=backend)
    out = lowrank_edit(edit.hidden.reshape(shape), *args, subtract=True, backend=backend)
    assert out.shape == shape and torch.equal(out.reshape(-1, 65), expected)
