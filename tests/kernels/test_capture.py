"""CUDA graphs: an edit can be captured, and a replay edits the current values."""

from __future__ import annotations

import shutil

import pytest
import torch

from reft_kernels import RowPlan, lowrank_edit, lowrank_edit_
from reft_kernels.devtools.testing import Case, make_edit, same_bits

pytestmark = pytest.mark.gpu("CUDA graphs are CUDA's")

backends = pytest.mark.parametrize("backend", ["torch", "triton"])
cases = pytest.mark.parametrize(
    "case",
    [Case(65, 3, groups, missing="some") for groups in ((9,), (4, 4), (4, 0, 5))],
    ids=str,
)


def captured(call):
    """A graph of ``call``, which has run before, and what it returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@cases
@backends
def test_a_replay_edits_new_values(case, backend, device):
    edit = make_edit(case, device)
    parameters = (edit.encode, edit.bias, edit.decode)
    hidden = torch.zeros_like(edit.hidden)

    def call():
        return lowrank_edit(hidden, edit.plan, *parameters, **edit.options, backend=backend)

    graph, out = captured(call)
    hidden.copy_(edit.hidden)
    graph.replay()
    expected = lowrank_edit(edit.hidden, edit.plan, *parameters, **edit.options, backend=backend)
    assert same_bits(out, expected)


@cases
@backends
def test_forward_and_backward_are_captured(case, backend, device):
    edit = make_edit(case, device)
    leaves = [
        getattr(edit, name).clone().requires_grad_()
        for name in ("hidden", "encode", "bias", "decode")
    ]
    upstream = torch.zeros_like(edit.upstream)

    def call():
        hidden, *parameters = leaves
        out = lowrank_edit_(hidden * 1, edit.plan, *parameters, **edit.options, backend=backend)
        return torch.autograd.grad(out, leaves, upstream)

    graph, grads = captured(call)
    upstream.copy_(edit.upstream)
    graph.replay()
    assert all(same_bits(got, wanted) for got, wanted in zip(grads, call(), strict=True))


@pytest.mark.parametrize("case", [Case(65, 3, (2, 4))], ids=str)
@pytest.mark.parametrize("backend", ["triton"])
def test_a_plan_of_ragged_groups_is_made_inside_a_capture(case, backend, device):
    """Its offsets are filled in on the device: a copy from the host is forbidden there."""
    edit = make_edit(case, device)
    rows = edit.plan.rows.clone()

    def call():
        plan = RowPlan(rows, (0, 2, 6))
        parameters = (edit.encode, edit.bias, edit.decode)
        return lowrank_edit(edit.hidden, plan, *parameters, **edit.options, backend=backend)

    graph, out = captured(call)
    graph.replay()
    assert same_bits(out, call())


@pytest.mark.traced
@pytest.mark.skipif(shutil.which("g++") is None, reason="not run: inductor needs a C++ compiler")
@cases
@pytest.mark.parametrize("named", ["torch", "triton"])
def test_compiled_for_graphs(case, named, device):
    """mode="reduce-overhead" captures what it compiles; a copy from the host would keep it from
    that, and new numbers must be seen by every replay."""
    torch.compiler.reset()
    edit = make_edit(case, device)
    parameters = (edit.encode, edit.bias, edit.decode)

    def forward(hidden):
        return lowrank_edit(
            hidden * 2, edit.plan, *parameters, **edit.options, backend=named
        ).tanh()

    traced = torch.compile(forward, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for scale in (1.0, 0.5, 0.25, 2.0):
            hidden = edit.hidden * scale
            torch.testing.assert_close(traced(hidden), forward(hidden))
    torch.compiler.reset()
