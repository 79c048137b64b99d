"""Row plans: rows, groups, errors, and no host synchronisation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from reft_kernels import RowPlan
from reft_kernels import rows as rows_module

pytestmark = pytest.mark.host("plans are made and checked on the CPU")


def test_rows_are_sorted_by_group_and_stay_in_order_within():
    plan = RowPlan.from_rows([9, 4, 7, 1, 3], groups=[2, 0, 2, 0, 3], num_groups=5)
    assert plan.rows.tolist() == [4, 1, 9, 7, 3]
    assert plan.offsets == (0, 2, 2, 4, 5, 5)
    assert (plan.num_rows, plan.num_groups, plan.largest_group, plan.max_row) == (5, 5, 2, 9)
    assert plan.complete and plan.rows.dtype is torch.int64 and plan.rows.is_contiguous()
    assert plan.device_offsets.tolist() == [0, 2, 2, 4, 5, 5]


def test_one_group_keeps_the_order_and_leaves_the_others_empty():
    plan = RowPlan.from_rows([5, -1, 0], num_groups=3)
    assert plan.rows.tolist() == [5, -1, 0] and plan.offsets == (0, 3, 3, 3)
    assert plan.max_row == 5 and not plan.complete


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str
)
def test_any_integers_will_do(dtype):
    plan = RowPlan.from_rows(
        torch.tensor([3, 1], dtype=dtype), torch.tensor([1, 0], dtype=dtype), 2
    )
    assert plan.rows.tolist() == [1, 3] and plan.rows.dtype is torch.int64


@pytest.mark.parametrize("offsets", [(0, 3, 3, 9), (0, 4, 8, 9), (0, 0, 2)], ids=str)
def test_offsets_on_the_device_are_those_of_the_host(offsets):
    plan = RowPlan(torch.arange(offsets[-1]), offsets)
    assert plan.device_offsets.tolist() == list(offsets)
    assert plan.device_offsets.dtype is torch.int64
    assert plan.device_offsets is plan.device_offsets, "made anew for every layer"
    assert plan.places is plan.places or plan.places[0] is plan.places[0]
    served = plan.using(torch.zeros(len(offsets) - 1, dtype=torch.int64))
    assert served.device_offsets is plan.device_offsets, "made anew for every table"


@pytest.mark.parametrize("offsets", [(0, 3, 6, 9), (0, 5), (0, 0, 0)], ids=str)
def test_equal_groups_need_no_offsets_on_the_device(offsets):
    plan = RowPlan(torch.arange(offsets[-1]), offsets)
    assert plan.device_offsets is None and plan.largest_group == offsets[1]


def test_a_plan_without_groups_has_nothing_to_launch():
    plan = RowPlan(torch.arange(0), (0,))
    assert (plan.num_groups, plan.largest_group, plan.device_offsets) == (0, 0, None)


class OnCuda(torch.Tensor):
    """Rows that claim to be on a GPU."""

    is_cuda = True
    device = torch.device("cuda:0")


def test_offsets_are_made_with_the_plan_and_never_first_in_a_capture(monkeypatch):
    """In a graph capture, numbers may be filled in on the device but not copied to it."""
    made = []
    monkeypatch.setattr(rows_module, "_tensor_of", lambda *args: made.append(args))
    RowPlan(torch.arange(6).as_subclass(OnCuda), (0, 3, 6))
    assert made == []
    plan = RowPlan(torch.arange(6).as_subclass(OnCuda), (0, 2, 6))
    assert made == [((0, 2, 6), torch.device("cuda:0"))]
    served = plan.using(torch.zeros(2, dtype=torch.int64).as_subclass(OnCuda))
    assert len(made) == 1, "the same offsets, made again"
    served.to("cpu")
    assert made[1:] == [((0, 2, 6), torch.device("cuda:0"))]  # the subclass still claims its device


def test_offsets_of_a_capture_are_filled_in_on_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    from torch._subclasses import FakeTensorMode

    seen = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Noted():
        offsets = rows_module._tensor_of((0, 2, 6), torch.device("cuda:0"))
    assert offsets.shape == (3,) and offsets.dtype is torch.int64
    assert set(seen) <= {"full", "stack", "cat", "unsqueeze", "empty", "fill_"}, seen


@pytest.mark.parametrize(
    ("groups", "rows", "offsets"),
    [
        (None, [1, 4, 6, -1, 10, -1], (0, 6, 6)),
        ([0, 1, 1], [1, -1, 4, 6, 10, -1], (0, 2, 6)),  # by column: prefix and suffix
        ([[1], [0]], [-1, 10, -1, 1, 4, 6], (0, 3, 6)),  # by sequence: adapters
        ([[0, 1, 0], [1, 1, 0]], [1, 6, -1, 4, -1, 10], (0, 3, 6)),
    ],
    ids=["none", "columns", "sequences", "both"],
)
def test_padded_positions_become_rows(groups, rows, offsets):
    positions = torch.tensor([[1, 4, 6], [-1, 3, -1]])
    plan = RowPlan.from_padded(positions, seq_len=7, groups=groups, num_groups=2)
    assert plan.rows.tolist() == rows and plan.offsets == offsets


def test_a_plan_moves_and_stays_itself(device):
    plan = RowPlan.from_rows([3, -1, 2], [1, 0, 1], 2)
    moved = plan.to("meta")
    assert moved.device.type == "meta" and moved.offsets == plan.offsets
    assert (moved.max_row, moved.complete) == (3, False)
    assert plan.to("cpu") is plan
    assert plan.to(device).rows.tolist() == [-1, 3, 2]


REFUSED = [
    (lambda: RowPlan.from_rows([0, 3, 0]), ValueError, "rows must not repeat, got row 0"),
    (lambda: RowPlan.from_rows([0, 5, 5], [0, 0, 1], 2), ValueError, "row 5 twice"),
    (lambda: RowPlan.from_rows([1, -2]), ValueError, "rows must be −1 .* got -2"),
    (lambda: RowPlan.from_rows([[1], [2]]), TypeError, "rows must be integers"),
    (lambda: RowPlan.from_rows([1.0]), TypeError, r"rows must be integers, got \[1.0\]"),
    (lambda: RowPlan.from_rows(torch.ones(2)), TypeError, "rows must have an integer .*float32"),
    (lambda: RowPlan.from_rows(torch.tensor([True])), TypeError, "integer dtype, got torch.bool"),
    (lambda: RowPlan.from_rows(torch.tensor([[1]])), ValueError, r"one-dimensional.*\(1, 1\)"),
    (lambda: RowPlan.from_rows([1, 2], [0, 2], 2), ValueError, "groups must lie in 0 … 1, got 2"),
    (lambda: RowPlan.from_rows([1, 2], [0, -1], 2), ValueError, "groups must lie in 0 … 1, got -1"),
    (lambda: RowPlan.from_rows([1, 2], [0]), ValueError, "2 rows, 1 groups"),
    (lambda: RowPlan.from_rows([1], num_groups=0), ValueError, "num_groups .* at least 1, got 0"),
    (lambda: RowPlan.from_rows([1], num_groups=1.0), ValueError, "num_groups must be an integer"),
    (lambda: RowPlan.from_padded([[1]], 4), TypeError, "positions must be an integer tensor"),
    (lambda: RowPlan.from_padded(torch.ones(1, 1), 4), TypeError, "got dtype torch.float32"),
    (lambda: RowPlan.from_padded(torch.tensor([1]), 4), ValueError, r"got shape \(1,\)"),
    (lambda: RowPlan.from_padded(torch.tensor([[4]]), 4), ValueError, "below seq_len = 4.*got 4"),
    (lambda: RowPlan.from_padded(torch.tensor([[-2]]), 4), ValueError, "got -2"),
    (lambda: RowPlan.from_padded(torch.tensor([[1, 1]]), 4), ValueError, "must not repeat"),
    (lambda: RowPlan.from_padded(torch.tensor([[0]]), -1), ValueError, "seq_len .* got -1"),
    (
        lambda: RowPlan.from_padded(torch.tensor([[0, 1]]), 4, [0, 0, 1], 2),
        ValueError,
        r"groups must broadcast to the shape of positions \(1, 2\).*got \(3,\)",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
def test_bad_plans_are_refused_with_the_value(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_sequences_may_name_the_same_position():
    plan = RowPlan.from_padded(torch.tensor([[2, -1], [2, -1]]), 4)
    assert plan.rows.tolist() == [2, -1, 6, -1]


def test_a_plan_on_a_device_is_made_without_looking_at_it():
    """The meta device has no values: asking for one raises."""
    positions = torch.empty(4, 3, dtype=torch.int64, device="meta")
    for groups in (None, [1, 0, 1], [[0], [1], [1], [0]]):
        plan = RowPlan.from_padded(positions, 9, groups, 2)
        assert plan.num_rows == 12 and plan.max_row is None and not plan.complete
        assert plan.device_offsets is None or plan.device_offsets.device.type == "meta"
        assert len(plan.places) == 2


def test_tensors_shared_by_layers_are_made_without_waiting(no_synchronisation):
    plan = RowPlan(torch.tensor([4, -1, 2, -1]), (0, 2, 2, 4))
    with no_synchronisation():
        _ = plan.places, plan.device_offsets


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    st.lists(
        st.tuples(st.integers(-1, 30), st.integers(0, 4)), max_size=20, unique_by=lambda t: t[0]
    )
)
def test_any_plan_keeps_each_row_with_its_group(pairs):
    plan = RowPlan.from_rows([row for row, _ in pairs], [group for _, group in pairs], 5)
    placed = [
        (row, group)
        for group, (a, b) in enumerate(zip(plan.offsets, plan.offsets[1:], strict=False))
        for row in plan.rows[a:b].tolist()
    ]
    assert placed == sorted(pairs, key=lambda pair: pair[1])
    assert plan.complete == all(row >= 0 for row, _ in pairs)
    assert plan.max_row == max((row for row, _ in pairs), default=-1)
