"""Plans with slots, whose groups use entries of a table, against the reference in float64 and by
hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reft_kernels import FAMILY, RowPlan, lowrank_edit, lowrank_edit_, reference
from reft_kernels.devtools.testing import Case, make_edit, relative_error, same_bits
from reft_kernels.rows import MAX_RUN_ROWS

backends = pytest.mark.parametrize("backend", ["torch", "triton"])
#: Sizes of groups: one group, equal neighbours, ragged with empty ones, many of one row.
GROUPS = [(9,), (4, 4, 4, 2), (0, 3, 3, 0, 1, 5), (1,) * 12]
ENTRIES = 7


def tabled(case, device, *, scales=True):
    """Make an edit whose parameters are a table of 7 entries. Unused entries are NaN."""
    groups = case.groups
    edit = make_edit(replace(case, groups=(0,) * ENTRIES), device)
    body = make_edit(case, device)
    random = torch.Generator().manual_seed(1)
    slots = torch.randint(-1, ENTRIES - 1, (len(groups),), generator=random)
    slots[0] = max(int(slots[0]), 0)
    if len(groups) > 1:
        slots[-2] = -1
    factors = torch.randn(len(groups), generator=random) if scales else None
    plan = body.plan.using(slots.to(device), None if factors is None else factors.to(device=device))
    unused = torch.ones(ENTRIES, dtype=torch.bool)
    unused[slots[slots >= 0]] = False
    parameters = {}
    for name in ("encode", "bias", "decode"):
        value = getattr(edit, name)
        parameters[name] = None
        if value is not None:
            value[unused] = float("nan")
            parameters[name] = value
    return replace(body, plan=plan, **parameters), slots


def run(function, edit, **options):
    args = (edit.plan, edit.encode, edit.bias, edit.decode)
    return function(edit.hidden.clone(), *args, **edit.options, **options)


@pytest.mark.parametrize(
    ("scales", "groups"),
    [*((True, groups) for groups in GROUPS), (False, GROUPS[2])],
    ids=[*(f"scaled-{groups}" for groups in GROUPS), f"unscaled-{GROUPS[2]}"],
)
@pytest.mark.parametrize("activation", [None, "gelu"], ids=["linear", "gelu"])
@pytest.mark.parametrize("member", FAMILY)
@backends
def test_equal_to_the_reference(backend, groups, member, activation, scales, device):
    case = Case(65, 3, groups, "some", member=member, activation=activation)
    edit, _ = tabled(case, device, scales=scales)
    exact = run(reference.lowrank_edit, edit.cast(torch.float64))
    for function in (lowrank_edit, lowrank_edit_) if scales else (lowrank_edit_,):
        overall, worst = relative_error(run(function, edit, backend=backend), exact)
        assert overall < 1e-6 and worst < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("rank", [1, 16])
@backends
def test_half_precision_is_rounded_once(backend, rank, dtype, device):
    edit, _ = tabled(Case(64, rank, (4, 4, 4, 2), dtype=dtype), device)
    exact = run(reference.lowrank_edit, edit.cast(torch.float64))
    out = run(lowrank_edit_, edit, backend=backend)
    step = torch.finfo(dtype).eps * exact.abs().clamp(min=1)
    assert ((out.double() - exact).abs() <= step).all()


@pytest.mark.parametrize("groups", GROUPS[1:], ids=str)
@backends
def test_the_reference_means_one_edit_a_group(backend, groups, device):
    """Each group is edited separately with its entry's parameters, and scaled by hand."""
    edit, slots = tabled(Case(33, 3, groups, "some"), device)
    assert (slots < 0).any() and edit.plan.scales is not None
    expected = edit.hidden.clone()
    for k, entry in enumerate(slots.tolist()):
        rows = edit.plan.rows[edit.plan.offsets[k] : edit.plan.offsets[k + 1]]
        rows = rows[rows >= 0]
        if entry < 0:
            continue
        alone = lowrank_edit(
            edit.hidden, RowPlan.from_rows(rows), edit.encode[entry], edit.bias[entry],
            edit.decode[entry], **edit.options, backend="reference",
        )  # fmt: skip
        delta = (alone - edit.hidden)[rows]
        expected[rows] += edit.plan.scales[k] * delta
    out = run(lowrank_edit, edit, backend=backend)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)


@backends
def test_unedited_rows_keep_their_bits(backend, device):
    edit, slots = tabled(Case(65, 4, (4, 4, 4, 2), "some"), device)
    passed = [k for k, entry in enumerate(slots.tolist()) if entry < 0]
    assert passed
    groups = [edit.plan.rows[edit.plan.offsets[k] : edit.plan.offsets[k + 1]] for k in passed]
    still = torch.cat([*(rows[rows >= 0] for rows in groups), edit.unnamed])
    edit.hidden[still[0]] = float("nan")
    edit.hidden[still[1], ::2] = -0.0
    out = run(lowrank_edit_, edit, backend=backend)
    assert same_bits(out[still], edit.hidden[still])
    assert out[edit.live].isfinite().any()


@backends
def test_no_group_has_an_entry(backend, device):
    edit, _ = tabled(Case(33, 3, (4, 4)), device)
    plan = edit.plan.using(torch.full((2,), -1, device=device))
    out = run(lowrank_edit_, replace(edit, plan=plan), backend=backend)
    assert same_bits(out, edit.hidden)


@pytest.mark.parametrize("groups", [(14,) * 3, (14,) * 64], ids=["3", "64"])
@pytest.mark.parametrize("backend", ["triton"])
def test_one_launch_for_any_number_of_adapters(backend, groups, device, ran):
    edit, _ = tabled(Case(33, 3, groups), device)
    run(lowrank_edit_, edit, backend=backend)
    assert ran == {"triton.edit_rows_kernel": 1}


@pytest.mark.host("runs of a plan are counted by the host")
def test_runs_are_equal_groups_side_by_side_and_not_too_long():
    plan = RowPlan(torch.arange(18), (0, 4, 8, 8, 12, 14, 16, 18))
    assert plan.runs == [(0, 2), (3, 4), (4, 7)]
    sizes = [0]
    for _ in range(200):
        sizes.append(sizes[-1] + 14)
    plan = RowPlan(torch.arange(sizes[-1]), tuple(sizes))
    assert [b for _, b in plan.runs] == [*range(MAX_RUN_ROWS // 14, 200, MAX_RUN_ROWS // 14), 200]
    assert all((b - a) * 14 <= MAX_RUN_ROWS for a, b in plan.runs)
    assert RowPlan(torch.arange(2 * MAX_RUN_ROWS), (0, 2 * MAX_RUN_ROWS)).runs == [(0, 1)]


def test_mistakes(device):
    edit, _ = tabled(Case(33, 3, (4, 4)), device)
    plan = edit.plan
    with pytest.raises(TypeError, match=r"slots must be torch\.int64, got torch\.int32"):
        plan.using(torch.zeros(2, dtype=torch.int32, device=device))
    with pytest.raises(TypeError, match=r"scales must be torch\.float32"):
        plan.using(plan.slots, torch.ones(2, dtype=torch.float64, device=device))
    with pytest.raises(ValueError, match=r"slots must have one entry per group, 2 in total"):
        plan.using(torch.zeros(3, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="decode must be \\(entries, r, D\\)"):
        lowrank_edit(edit.hidden, plan, edit.encode[0], edit.bias[0], edit.decode[0])
    if device.type == "cpu":
        for wrong in (-2, ENTRIES):
            slots = torch.tensor([0, wrong])
            with pytest.raises(ValueError, match=f"slots must lie in −1 … 6.*got {wrong}"):
                run(lowrank_edit, replace(edit, plan=plan.using(slots)))
    edit.decode.requires_grad_(True)
    with pytest.raises(ValueError, match="must not require grad for a plan with slots"):
        run(lowrank_edit, edit)
    with torch.no_grad():
        run(lowrank_edit, edit)
