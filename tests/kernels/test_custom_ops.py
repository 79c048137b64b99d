"""torch.compile(fullgraph=True) traces the edit with eager results and gradients, and the custom
operators agree with their schema and fake implementations."""

from __future__ import annotations

import shutil

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from reft_kernels import RowPlan, lowrank_edit, lowrank_edit_
from reft_kernels._triton import launch
from reft_kernels.devtools.testing import Case, budget, count_paths, make_edit, run_edit, same_bits
from reft_kernels.rows import LaunchRows

pytestmark = pytest.mark.traced

CASES = [
    Case(65, 3, (4, 5), missing="some"),
    Case(65, 16, (4, 0, 5), missing="some", activation="gelu"),
    Case(64, 4, (7,), member="consreft", dtype=torch.bfloat16),
    Case(64, 2, (7,), member="lobireft", layout="swapped"),
    Case(64, 4, (7,), member="direft", layout="sliced", biased=False),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function, mode="aot_eager"):
    # The forward is more than the edit: operators before and after it are in the graph too.
    def forward(hidden, plan, *parameters, **options):
        return function(hidden * 2, plan, *parameters, **options).tanh()

    return forward, torch.compile(forward, fullgraph=True, backend=mode)


@pytest.mark.parametrize("function", [lowrank_edit, lowrank_edit_], ids=["apart", "inplace"])
@pytest.mark.parametrize("named", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_is_eager(case, named, function, device):
    edit = make_edit(case, device)
    eager, traced = compiled(function)
    expected = run_edit(eager, edit, backend=named)
    result = run_edit(traced, edit, backend=named)
    assert same_bits(result.out, expected.out)
    for name, grad in expected.grads.items():
        assert (grad is None) == (result.grads[name] is None)
        # Not compared by bits: traced code adds 0 to a gradient, and −0 becomes 0.
        assert grad is None or torch.equal(result.grads[name], grad), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="not run: inductor needs a C++ compiler")
@pytest.mark.parametrize("named", ["torch", "triton"])
def test_inductor_stays_within_the_budget(named, device):
    judge = budget(make_edit(CASES[0], device))
    traced = torch.compile(lowrank_edit_, fullgraph=True)
    judge.check(run_edit(traced, judge.edit, backend=named))


@pytest.mark.parametrize("named", ["torch", "triton"])
def test_a_compiled_edit_in_place_writes_into_its_argument(named, device):
    edit = make_edit(Case(65, 3, (4, 5), missing="some"), device)
    args = (edit.plan, edit.encode, edit.bias, edit.decode)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def forward(hidden):
        lowrank_edit_(hidden, *args, **edit.options, backend=named)
        return hidden.sum()

    hidden = edit.hidden.clone()
    forward(hidden)
    assert same_bits(hidden, lowrank_edit(edit.hidden, *args, **edit.options, backend=named))


def test_a_compiled_edit_launches_the_kernels(device):
    edit = make_edit(CASES[0], device)
    _, traced = compiled(lowrank_edit)
    run_edit(traced, edit, backend="triton")
    with count_paths() as counts:
        run_edit(traced, edit, backend="triton")
    assert counts == {
        "triton.edit_rows_kernel": 1,
        "triton.edit_rows_grad_kernel": 1,
        "triton.edit_params_grad_kernel": 1,
    }


@pytest.mark.parametrize("named", ["torch", "triton"])
def test_a_new_plan_of_the_same_shape_is_not_traced_again(named, device):
    """Rows are data: they differ in every batch."""
    edit = make_edit(Case(65, 3, (4, 5)), device)
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph

    traced = torch.compile(lowrank_edit, fullgraph=True, backend=note)
    args = (edit.encode, edit.bias, edit.decode)
    for rows in ([0, 1, 2, 3, 4, 5, 6, 7, 8], [9, -1, 7, 6, 5, 4, -1, 3, 2]):
        plan = RowPlan(torch.tensor(rows, device=device), (0, 4, 9))
        out = traced(edit.hidden, plan, *args, **edit.options, backend=named)
        expected = lowrank_edit(edit.hidden, plan, *args, **edit.options, backend=named)
        assert same_bits(out, expected)
    assert len(graphs) == 1


def test_a_plan_made_inside_the_graph(device):
    """The plan comes from padded positions, like in a model's forward."""
    edit = make_edit(Case(65, 3, (6,), extra=8), device)
    hidden = edit.hidden.reshape(2, 7, 65)

    def forward(hidden, positions):
        plan = RowPlan.from_padded(positions, 7)
        return lowrank_edit(hidden, plan, edit.encode, edit.bias, edit.decode, backend="torch")

    positions = torch.tensor([[0, 1, 6], [-1, 3, 4]], device=device)
    traced = torch.compile(forward, fullgraph=True, backend="aot_eager")
    assert same_bits(traced(hidden, positions), forward(hidden, positions))


@pytest.mark.parametrize("groups", [(9,), (4, 4), (4, 0, 5)], ids=["one", "equal", "ragged"])
def test_a_compiled_call_makes_no_plan_and_copies_no_numbers(groups, device, monkeypatch):
    """Each would cost a launch, or a copy that the host waits for, in every layer and direction."""
    edit = make_edit(Case(65, 3, groups), device)
    targets = []

    def note(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    traced = torch.compile(lowrank_edit, fullgraph=True, backend=aot_autograd(fw_compiler=note))
    first = run_edit(traced, edit, backend="triton")
    assert any("edit_backward" in target for target in targets)
    made_on_host = ("arange", "lift_fresh", "_to_copy", "device_put", "full", "scalar_tensor")
    assert not [target for target in targets if any(name in target for name in made_on_host)]

    seen = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    def noted(real):
        def edit(hidden, rows, *args, **kwargs):
            assert isinstance(rows, LaunchRows), "a plan was made"
            with Noted():
                return real(hidden, rows, *args, **kwargs)

        return edit

    for name in ("edit_forward", "edit_backward"):
        monkeypatch.setattr(launch, name, noted(getattr(launch, name)))
    again = run_edit(traced, edit, backend="triton")
    assert seen and not set(seen) & set(made_on_host), seen
    assert same_bits(again.out, first.out)
    assert all(same_bits(again.grads[name], grad) for name, grad in first.grads.items())


def test_ragged_groups_of_a_plan_made_inside_the_graph(device):
    """Offsets are filled in by the graph itself, and are right."""
    edit = make_edit(Case(65, 3, (2, 4), extra=8), device)
    hidden = edit.hidden.reshape(2, 7, 65)
    groups = torch.tensor([0, 1, 1])

    def forward(hidden, positions):
        plan = RowPlan.from_padded(positions, 7, groups, 2)
        return lowrank_edit(hidden, plan, edit.encode, edit.bias, edit.decode, backend="triton")

    positions = torch.tensor([[0, 1, 6], [-1, 3, 4]], device=device)
    traced = torch.compile(forward, backend="aot_eager")
    assert same_bits(traced(hidden, positions), forward(hidden, positions))


def operator_arguments(device, activation, rank):
    edit = make_edit(Case(33, rank, (4, 5), missing="some", activation=activation), device)
    subtract = activation is not None
    return edit, (edit.plan.rows, edit.plan.device_offsets, 2, 5), subtract


@pytest.mark.parametrize("activation", [None, "gelu"], ids=["linear", "gelu"])
@pytest.mark.parametrize("saves", [True, False], ids=["saves", "saves-nothing"])
def test_the_forward_operator_matches_its_schema(activation, saves, device):
    edit, plan, subtract = operator_arguments(device, activation, 3)
    parameters = (edit.encode, edit.bias, edit.decode)
    tables = (None, None)
    if not saves:
        tables = (torch.tensor([1, -1], device=device), torch.tensor([0.5, 2.0], device=device))
    args = (edit.hidden.clone(), *plan, *tables, *parameters, subtract, activation, saves, saves)
    torch.library.opcheck(torch.ops.reft_kernels.edit_forward.default, args)


@pytest.mark.parametrize("activation", [None, "gelu"], ids=["linear", "gelu"])
@pytest.mark.parametrize(
    "wants", [(True,) * 4, (False, True, False, True), (True, False, False, False)]
)
def test_the_backward_operator_matches_its_schema(activation, wants, device):
    edit, plan, subtract = operator_arguments(device, activation, 3)
    forward = torch.ops.reft_kernels.edit_forward
    parameters = (edit.encode, edit.bias, edit.decode)
    options = (subtract, activation, True, True)
    saved = forward(edit.hidden.clone(), *plan, None, None, *parameters, *options)
    args = (
        edit.upstream,
        *plan,
        edit.encode,
        edit.decode,
        *saved,
        subtract,
        activation,
        list(wants),
    )
    torch.library.opcheck(torch.ops.reft_kernels.edit_backward.default, args)
