"""Properties of the edit that need no oracle, for every member of the family and every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reft_kernels import FAMILY, RowPlan, fold, loreft, loreft_, lowrank_edit, lowrank_edit_
from reft_kernels.devtools.testing import Case, make_edit, run_edit, same_bits

backends = pytest.mark.parametrize("backend", ["torch", "triton"])
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
members = pytest.mark.parametrize("member", FAMILY)
PARAMETERS = ("encode", "bias", "decode")


def edited(edit, backend, function=lowrank_edit, **changes):
    """The output for an edit with some tensors or options replaced."""
    options = edit.options | {k: changes.pop(k) for k in ("activation", "subtract") if k in changes}
    edit = replace(edit, **changes)
    args = (edit.plan, edit.encode, edit.bias, edit.decode)
    return function(edit.hidden, *args, **options, backend=backend)


def orthonormal_edit(member, device, activation=None, dtype=torch.float32):
    edit = make_edit(Case(65, 4, (5, 6), member=member, activation=activation, dtype=dtype), device)
    rows = torch.linalg.qr(edit.decode.double().mT).Q.mT
    return replace(edit, decode=rows.contiguous().float())


def by_group(edit, values):
    """Yield each group's number and its rows of ``values``."""
    for k, (a, b) in enumerate(zip(edit.plan.offsets, edit.plan.offsets[1:], strict=False)):
        yield k, values[edit.plan.rows[a:b]].double()


def close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------- 1: unedited rows


@members
@dtypes
@backends
def test_unnamed_rows_keep_their_bits_in_place_and_apart(member, dtype, backend, device):
    edit = make_edit(Case(65, 3, (4, 5), missing="some", member=member, dtype=dtype), device)
    edit.hidden[edit.unnamed[0]] = float("nan")
    edit.hidden[edit.unnamed[1], ::2] = -0.0
    before = edit.hidden.clone()
    apart = edited(edit, backend)
    assert same_bits(edit.hidden, before), "hidden was modified"
    inplace = before.clone()
    assert edited(edit, backend, lowrank_edit_, hidden=inplace) is inplace
    assert same_bits(apart, inplace)
    assert same_bits(apart[edit.unnamed], before[edit.unnamed])
    assert not (apart[edit.live] == before[edit.live]).all(-1).any(), "a row was not edited"


@members
@backends
def test_only_missing_rows_change_nothing_and_get_zero_gradients(member, backend, device):
    edit = make_edit(Case(65, 3, (4, 5), missing="all", member=member), device)
    result = run_edit(lowrank_edit, edit, backend=backend)
    assert same_bits(result.out, edit.hidden)
    assert same_bits(result.grads["hidden"], edit.upstream)
    for name in PARAMETERS:
        grad = result.grads[name]
        assert (grad is None) == (getattr(edit, name) is None)
        assert grad is None or not grad.any(), name


@pytest.mark.parametrize("named", ["torch", "triton", "reference"])
@pytest.mark.parametrize("function", [lowrank_edit, lowrank_edit_], ids=["apart", "inplace"])
@pytest.mark.parametrize("groups", [(0,), (0, 0, 0)], ids=["one", "three"])
def test_an_empty_plan_returns_the_input_and_zero_gradients(named, function, groups, device, ran):
    edit = make_edit(Case(65, 3, groups), device)
    result = run_edit(function, edit, backend=named)
    assert same_bits(result.out, edit.hidden)
    assert same_bits(result.grads["hidden"], edit.upstream)
    assert all(result.grads[name].eq(0).all() for name in PARAMETERS)
    assert not any(name.startswith("triton") for name in ran), "nothing is worth a launch"


@pytest.mark.parametrize("shape", [(0, 65), (2, 0, 65)], ids=str)
@pytest.mark.parametrize("named", ["torch", "triton"])
def test_an_empty_hidden_is_edited_to_itself(named, shape, device):
    edit = make_edit(Case(65, 3, (0,)), device)
    empty = torch.empty(shape, device=device)
    for plan in (edit.plan, RowPlan.from_rows([-1, -1]).to(device)):
        result = run_edit(
            lowrank_edit, replace(edit, hidden=empty, upstream=empty, plan=plan), backend=named
        )
        assert result.out.shape == shape and result.grads["hidden"].shape == shape
        assert all(result.grads[name].eq(0).all() for name in PARAMETERS)


@backends
def test_an_edit_apart_owns_its_memory(backend, device):
    edit = make_edit(Case(65, 3, (4,), missing="all"), device)
    out = edited(edit, backend)
    assert out.data_ptr() != edit.hidden.data_ptr() and out.is_contiguous()
    swapped = edit.hidden.T.contiguous().T
    assert edited(edit, backend, hidden=swapped).is_contiguous()


# ------------------------------------------------------------------- 2, 3: orthonormal R


@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
@pytest.mark.parametrize("member", [name for name, spec in FAMILY.items() if spec.orthonormal])
@backends
def test_an_orthonormal_decoder_reads_back_the_code(member, activation, backend, device):
    """R h' = act(W h + b) with σ = 1, and R h more without."""
    edit = orthonormal_edit(member, device, activation)
    out = edited(edit, backend)
    before = dict(by_group(edit, edit.hidden))
    for k, rows in by_group(edit, out):
        decode, code = edit.decode[k].double(), edit.bias[k].double()
        if edit.encode is not None:
            code = code + before[k] @ edit.encode[k].double().T
        if activation is not None:
            code = getattr(torch, activation)(code)
        if not FAMILY[member].subtract:
            code = code + before[k] @ decode.T
        assert (rows @ decode.T - code).abs().max() < 4e-6


@members
@backends
def test_the_change_lies_in_the_row_space_of_the_decoder(member, backend, device):
    edit = orthonormal_edit(member, device, "gelu")
    before = dict(by_group(edit, edit.hidden))
    for k, rows in by_group(edit, edited(edit, backend)):
        change, decode = rows - before[k], edit.decode[k].double()
        outside = change - change @ decode.T @ decode
        assert change.norm(dim=-1).min() > 0.1 and outside.abs().max() < 2e-6


@backends
def test_consreft_twice_is_consreft_once(backend, device):
    edit = orthonormal_edit("consreft", device)
    once = edited(edit, backend)
    twice = edited(edit, backend, hidden=once)
    assert (once - edit.hidden).abs().max() > 0.1 and (twice - once).abs().max() < 2e-6


@backends
def test_lobireft_adds_one_vector_to_every_row(backend, device):
    edit = make_edit(Case(65, 1, (9,), member="lobireft"), device)
    edit.hidden.zero_()
    out = edited(edit, backend)[edit.live]
    assert same_bits(out, (edit.bias * edit.decode).expand_as(out))


# ------------------------------------------------------------------- 4: folding


@pytest.mark.parametrize("member", [name for name, spec in FAMILY.items() if spec.subtract])
@backends
def test_folding_by_hand_changes_nothing_for_linear_members(member, backend, device):
    edit = make_edit(Case(65, 3, (4, 5), member=member), device)
    encode, subtract = fold(edit.encode, edit.decode, True, None)
    assert subtract is False
    folded = edited(edit, backend, encode=encode, subtract=False)
    assert same_bits(folded, edited(edit, backend))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
@backends
def test_folding_under_an_activation_would_be_another_edit(activation, backend, device):
    edit = make_edit(Case(65, 3, (4, 5), activation=activation), device)
    assert fold(edit.encode, edit.decode, True, activation) == (edit.encode, True)
    right = edited(edit, backend)
    wrong = edited(edit, backend, encode=edit.encode - edit.decode, subtract=False)
    assert (right - wrong)[edit.live].abs().amax(-1).min() > 0.1


def test_fold_without_subtraction_changes_nothing(device):
    encode, decode = (torch.full((2, 5), value, device=device) for value in (1.0, 3.0))
    assert fold(encode, decode, False, None) == (encode, False)
    assert fold(None, decode, False, None) == (None, False)
    folded, subtract = fold(None, decode, True, "relu")
    assert torch.equal(folded, -decode) and subtract is False
    assert torch.equal(fold(encode, decode, True, None)[0], torch.full_like(encode, -2.0))


# ------------------------------------------------------------------- 5, 6: groups and ranks


@pytest.mark.parametrize("rank", [3, 16])
@members
@backends
def test_a_group_split_into_two_of_equal_weights_is_one(member, rank, backend, device):
    edit = make_edit(Case(65, rank, (9,), missing="some", member=member), device)
    twins = {
        name: value.expand(2, *value.shape).contiguous()
        for name in PARAMETERS
        if (value := getattr(edit, name)) is not None
    }
    split = replace(edit, plan=RowPlan(edit.plan.rows, (0, 4, 9)), **twins)
    first, second = (run_edit(lowrank_edit, e, backend=backend) for e in (edit, split))
    assert close(second.out, first.out) and close(second.grads["hidden"], first.grads["hidden"])
    for name in twins:
        assert close(second.grads[name].sum(0), first.grads[name]), name


@pytest.mark.parametrize("rank", [3, 16])
@pytest.mark.parametrize("activation", [None, "relu"], ids=["linear", "relu"])
@backends
def test_the_order_of_rows_within_a_group_changes_no_bit_of_the_output(
    backend, activation, rank, device
):
    edit = make_edit(Case(65, rank, (7, 4), missing="some", activation=activation), device)
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3, 10, 8, 9, 7], device=device)
    shuffled = replace(edit, plan=RowPlan(edit.plan.rows[order], edit.plan.offsets))
    first, second = (run_edit(lowrank_edit, e, backend=backend) for e in (edit, shuffled))
    # A kernel treats every row alike; BLAS may sum the last rows of a matrix in another order.
    same = same_bits if backend == "triton" else close
    assert same(first.out, second.out) and same(first.grads["hidden"], second.grads["hidden"])


@pytest.mark.parametrize("ranks", [(3, 4), (12, 16)], ids=["fma", "matrix"])
@members
@backends
def test_zero_rows_behind_the_parameters_change_nothing(member, ranks, backend, device):
    """Adapters of several ranks share a launch, zero-padded to the largest."""
    edit = make_edit(Case(65, ranks[0], (4, 5), missing="some", member=member), device)
    more = ranks[1] - ranks[0]
    pad = torch.nn.functional.pad
    padded = replace(
        edit,
        encode=None if edit.encode is None else pad(edit.encode, (0, 0, 0, more)),
        bias=pad(edit.bias, (0, more)),
        decode=pad(edit.decode, (0, 0, 0, more)),
    )
    first, second = (run_edit(lowrank_edit, e, backend=backend) for e in (edit, padded))
    # The kernels pad ranks to powers of two themselves: the same sums. BLAS may order others.
    same = same_bits if backend == "triton" else close
    assert same(first.out, second.out) and same(first.grads["hidden"], second.grads["hidden"])
    for name in PARAMETERS:
        if first.grads[name] is not None:
            head = second.grads[name][:, : ranks[0]]
            assert close(first.grads[name], head), name


@backends
def test_groups_use_their_own_parameters_and_no_others(backend, device):
    """Each group alone, with its own matrices, gives what all give together."""
    edit = make_edit(Case(65, 3, (4, 0, 1, 6), missing="some"), device)
    together = run_edit(lowrank_edit, edit, backend=backend)
    # cuBLAS may take another kernel for matrices at other addresses.
    same = close if backend == "torch" and device.type == "cuda" else same_bits
    for k, (a, b) in enumerate(zip(edit.plan.offsets, edit.plan.offsets[1:], strict=False)):
        if a == b:
            continue
        parameters = {name: getattr(edit, name)[k] for name in PARAMETERS}
        alone = replace(edit, plan=RowPlan(edit.plan.rows[a:b], (0, b - a)), **parameters)
        result = run_edit(lowrank_edit, alone, backend=backend)
        rows = alone.live
        assert same(result.out[rows], together.out[rows])
        for name in PARAMETERS:
            assert same(result.grads[name], together.grads[name][k]), name


# ------------------------------------------------------------------- loreft, and autocast


@backends
def test_loreft_is_the_edit_with_its_arguments_in_the_papers_order(backend, device):
    edit = make_edit(Case(65, 3, (4, 5)), device)
    expected = edited(edit, backend)
    args = (edit.plan, edit.decode, edit.encode, edit.bias)
    assert same_bits(loreft(edit.hidden, *args, backend=backend), expected)
    inplace = edit.hidden.clone()
    assert loreft_(inplace, *args, backend=backend) is inplace and same_bits(inplace, expected)


@pytest.mark.parametrize("activation", [None, "gelu"], ids=["linear", "gelu"])
@backends
def test_autocast_around_the_edit_does_not_reach_inside(backend, activation, device):
    edit = make_edit(Case(100, 16, (5, 4), activation=activation), device)
    plain = run_edit(lowrank_edit, edit, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        wrapped = run_edit(lowrank_edit, edit, backend=backend)
    assert same_bits(plain.out, wrapped.out)
    assert all(same_bits(plain.grads[name], wrapped.grads[name]) for name in plain.grads)


def test_autocast_does_not_reach_into_the_reference(device):
    """Forward: plain autograd takes backward wherever it is called."""
    edit = make_edit(Case(100, 16, (5, 4)), device)
    plain = edited(edit, "reference")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert same_bits(edited(edit, "reference"), plain)
