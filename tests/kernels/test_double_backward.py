"""Derivatives of derivatives are right in every backend, whichever tensors an edit saved.

They are compared with finite differences of the first derivatives, and with autograd's own
derivatives of the reference, which consists of PyTorch operators.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from derivatives import NAMES, agree, backends, derivatives, edited, small
from torch.utils.checkpoint import checkpoint

from reft_kernels import FAMILY, lowrank_edit, lowrank_edit_
from reft_kernels.activations import ACTIVATIONS
from reft_kernels.devtools.testing import relative_error, same_bits

#: Inputs that require a gradient; they determine which tensors are saved.
LIVE = [NAMES, ("hidden",), ("encode",), ("bias",), ("decode",), ("hidden", "decode")]


@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "inplace"])
@pytest.mark.parametrize(
    ("member", "activation"),
    [("loreft", None), ("loreft", "gelu"), ("direft", "silu"), ("consreft", None)],
)
@backends
def test_second_derivatives_agree_with_finite_differences(
    backend, member, activation, inplace, device
):
    edit = small(device, groups=(2, 2), member=member, activation=activation)
    names = [name for name in NAMES if getattr(edit, name) is not None]

    def function(*tensors):
        return edited(edit, dict(zip(names, tensors, strict=True)), backend, inplace)

    tensors = tuple(getattr(edit, name).clone().requires_grad_() for name in names)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("activation", [None, "tanh"], ids=["linear", "tanh"])
@pytest.mark.parametrize("member", FAMILY)
@backends
def test_three_orders_are_those_of_the_reference(backend, member, activation, device):
    """For every choice of saved tensors, in place and out of place, for linear and curved losses,
    with ungrouped and grouped parameters."""
    for groups in ((4,), (3, 0, 2)):
        edit = small(device, groups=groups, member=member, activation=activation)
        for live in LIVE[:2] if backend == "triton" else LIVE:
            if all(getattr(edit, name) is None for name in live):
                continue
            for curved in (True, False):
                expected = derivatives(edit, live, "reference", 3, curved=curved)
                computed = derivatives(edit, live, backend, 3, inplace=curved, curved=curved)
                agree(computed, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["torch"])
def test_second_derivatives_of_every_activation(backend, activation, device):
    edit = small(device, activation=activation)
    agree(derivatives(edit, NAMES, backend, 2), derivatives(edit, NAMES, "reference", 2))


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed", "swapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_half_precision_loses_no_more_than_the_reference_does(backend, dtype, layout, device):
    edit = small(device, activation="tanh", dtype=dtype, layout=layout)
    exact = derivatives(edit.cast(torch.float64), NAMES, "reference", 2)
    eager = derivatives(edit, NAMES, "reference", 2)
    computed = derivatives(edit, NAMES, backend, 2)
    step = torch.finfo(dtype).eps
    for got, other, wanted in zip(computed, eager, exact, strict=True):
        assert got.dtype == other.dtype
        assert relative_error(got, wanted)[0] <= 3 * relative_error(other, wanted)[0] + 8 * step


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_unedited_rows_may_be_nan(backend, device):
    """A −1 borrows a row of memory, but not its values."""
    edit = small(device, dtype=torch.float32, activation="tanh")

    def second(hidden):
        leaves = {name: getattr(edit, name).clone().requires_grad_() for name in NAMES[1:]}
        out = edited(replace(edit, hidden=hidden), leaves, backend).reshape(-1, 5)[edit.live]
        first = torch.autograd.grad(out.sin().sum(), list(leaves.values()), create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), list(leaves.values()))

    hidden = edit.hidden.clone()
    hidden[edit.unnamed] = float("nan")
    agree(second(hidden), second(edit.hidden), 0)


@backends
def test_views_are_edited_in_place(backend, device):
    """A Function with several results may not write into a view, so the result is copied there."""
    edit = small(device)

    def whole(function):
        leaf = edit.hidden.clone().requires_grad_()
        both = torch.cat([leaf, 2 * leaf])
        part = both[: len(leaf)]
        done = function(part)
        if done is not part:
            both = torch.cat([done, both[len(leaf) :]])
        (first,) = torch.autograd.grad(both.sin().sum(), leaf, create_graph=True)
        return first.detach(), *torch.autograd.grad(first.square().sum(), leaf)

    rest = (edit.plan, edit.encode, edit.bias, edit.decode)
    computed = whole(lambda part: lowrank_edit_(part, *rest, **edit.options, backend=backend))
    agree(
        computed, whole(lambda part: lowrank_edit(part, *rest, **edit.options, backend="reference"))
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_with_a_graph_are_those_without(backend, device):
    edit = small(device, dtype=torch.float32, activation="gelu")
    leaves = {name: getattr(edit, name).clone().requires_grad_() for name in NAMES}
    given = edit.upstream.clone()
    out = edited(edit, leaves, backend, inplace=True)
    inputs = list(leaves.values())
    with_graph = torch.autograd.grad(out, inputs, given, create_graph=True)
    assert same_bits(given, edit.upstream), "the gradient of the caller was overwritten"
    without = torch.autograd.grad(out, inputs, given)
    agree([each.detach() for each in with_graph], without, 1e-6)
    assert all(each.requires_grad for each in with_graph)


@backends
def test_a_residual_stream_edited_in_place(backend, device):
    """Gradients without a graph are overwritten (test_grad_reuse); those with a graph are not."""
    edit = small(device, groups=(4,), activation="tanh")

    def second(inplace, backend):
        leaf = edit.hidden.clone().requires_grad_()
        encode = edit.encode.clone().requires_grad_()
        hidden = leaf * 1
        for _ in range(3):
            hidden = hidden + hidden.sin()
            given = replace(edit, hidden=hidden)
            if inplace:
                hidden = lowrank_edit_(
                    hidden, edit.plan, encode, edit.bias, edit.decode, **edit.options,
                    backend=backend,
                )  # fmt: skip
            else:
                hidden = edited(given, {"encode": encode}, backend)
        first = torch.autograd.grad(hidden.cos().sum(), (leaf, encode), create_graph=True)
        kept = [each.detach().clone() for each in first]
        return *kept, *torch.autograd.grad(sum(g.square().sum() for g in first), (leaf, encode))

    agree(second(True, backend), second(False, "reference"))


@pytest.mark.parametrize("backend", ["torch"])
def test_blocks_that_are_run_again_in_backward(backend, device):
    edit = small(device, activation="gelu")

    def second(run):
        leaf = edit.hidden.clone().requires_grad_()
        (first,) = torch.autograd.grad(run(leaf).sin().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)

    def block(hidden):
        return edited(edit, {"hidden": hidden}, backend)

    agree(second(lambda h: checkpoint(block, h, use_reentrant=False)), second(block))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_saved_tensors_are_freed_with_the_graph(backend, device):
    """Saved results keep no graph alive: it is freed with the last result, without a collection of
    Python's cycles."""

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # packing the tensor itself makes a cycle, also for exp

    edit, held = small(device, dtype=torch.float32, activation="gelu"), []

    def pack(tensor):
        kept = Kept(tensor)
        held.append(weakref.ref(kept))
        return kept

    gc.disable()
    try:
        for hooked in (True, False):
            leaves = {name: getattr(edit, name).clone().requires_grad_() for name in NAMES}
            alive = weakref.ref(leaves["hidden"])
            if hooked:
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
                    out = edited(edit, leaves, backend)
            else:
                out = edited(edit, leaves, backend)
            del out, leaves
            assert alive() is None
        assert held and all(reference() is None for reference in held)
    finally:
        gc.enable()
