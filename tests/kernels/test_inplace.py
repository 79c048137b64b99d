"""The contract of in-place edits: they write only the edited rows, and autograd knows of it."""

from __future__ import annotations

import pytest
import torch

from reft_kernels import lowrank_edit, lowrank_edit_
from reft_kernels.devtools.testing import Case, budget, laid_out, make_edit, same_bits

backends = pytest.mark.parametrize("backend", ["torch", "triton"])


@pytest.fixture
def edit(device):
    return make_edit(Case(65, 3, (4, 5), missing="some"), device)


def arguments(edit, **changes):
    named = {"encode": edit.encode, "bias": edit.bias, "decode": edit.decode}
    return {"plan": edit.plan, **named, **edit.options, **changes}


@backends
def test_only_edited_rows_of_a_slice_are_written(backend, edit):
    whole = torch.full((21, 80), 7.0, device=edit.hidden.device)
    window = whole[2:17, 9:74]
    window.copy_(edit.hidden)
    out = lowrank_edit_(window, **arguments(edit, backend=backend))
    assert out is window
    assert same_bits(window, lowrank_edit(edit.hidden, **arguments(edit, backend=backend)))
    window.fill_(7.0)
    assert (whole == 7.0).all(), "written outside of hidden"


@backends
def test_a_frozen_hidden_joins_the_graph(backend, edit):
    """The output of a block needs no gradient if only the adapter is trained."""
    hidden, encode = edit.hidden.clone(), edit.encode.clone().requires_grad_()
    out = lowrank_edit_(hidden, **arguments(edit, encode=encode, backend=backend))
    assert out is hidden and hidden.requires_grad and not hidden.is_leaf
    (grad,) = torch.autograd.grad(hidden, encode, edit.upstream)
    exact = budget(edit).exact.grads["encode"]
    assert (grad - exact).abs().max() < 1e-5


@backends
def test_without_any_gradient_there_is_no_graph(backend, edit):
    hidden = edit.hidden.clone()
    assert not lowrank_edit_(hidden, **arguments(edit, backend=backend)).requires_grad
    leaf = edit.hidden.clone().requires_grad_()
    with torch.no_grad():
        assert lowrank_edit_(leaf, **arguments(edit, backend=backend)) is leaf
    assert leaf.is_leaf and same_bits(leaf.detach(), hidden)


@backends
def test_overwriting_a_saved_tensor_raises_in_backward(backend, edit):
    """exp saves its output for backward, which the edit overwrites and marks as dirty."""
    leaf = edit.hidden.clone().requires_grad_()
    hidden = leaf.exp()
    version = hidden._version
    lowrank_edit_(hidden, **arguments(edit, backend=backend))
    assert hidden._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()


@backends
def test_a_residual_sum_may_be_edited_in_place(backend, edit):
    """A sum saves nothing of its output; the gradient passes through the edit into both terms."""
    a, b = (edit.hidden.clone().requires_grad_() for _ in range(2))
    (lowrank_edit_(a + b, **arguments(edit, backend=backend)) * edit.upstream).sum().backward()
    apart = edit.hidden.clone().requires_grad_()
    out = lowrank_edit(apart + edit.hidden, **arguments(edit, backend=backend))
    (out * edit.upstream).sum().backward()
    assert same_bits(a.grad, b.grad) and same_bits(a.grad, apart.grad)


@backends
def test_a_view_of_a_tensor_in_the_graph_is_edited_inside_it(backend, edit):
    leaf = edit.hidden.clone().requires_grad_()
    whole = torch.cat([leaf, 2 * leaf])
    lowrank_edit_(whole[: len(leaf)], **arguments(edit, backend=backend))
    (grad,) = torch.autograd.grad(whole, leaf, torch.cat([edit.upstream, edit.upstream]))
    expected = budget(edit).exact.grads["hidden"] + 2 * edit.upstream
    assert (grad - expected).abs().max() < 1e-5


@backends
def test_two_edits_of_one_tensor_are_one_after_the_other(backend, edit):
    """Two layers on one residual stream, in place: as apart, gradients too."""

    def twice(function):
        leaf = edit.hidden.clone().requires_grad_()
        encode = edit.encode.clone().requires_grad_()
        given = arguments(edit, encode=encode, backend=backend)
        out = function(function(leaf * 1, **given), **given)
        return out, *torch.autograd.grad(out, (leaf, encode), edit.upstream)

    for apart, in_place in zip(twice(lowrank_edit), twice(lowrank_edit_), strict=True):
        assert same_bits(apart, in_place)


REFUSED = {
    "leaf": lambda h: h.requires_grad_(),
    "view-of-a-leaf": lambda h: h.requires_grad_()[:],
    "expanded": lambda h: h[:1].expand(h.shape),
    "expanded-columns": lambda h: h[:, :1].expand(h.shape),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("named", ["auto", "torch", "triton", "reference"])
def test_tensors_that_cannot_be_edited_in_place_are_refused_unchanged(named, kind, edit, ran):
    original = edit.hidden.clone()
    hidden = REFUSED[kind](original)
    before = hidden.detach().clone()
    with pytest.raises(ValueError, match=r"hidden .*(leaf|overlaps)"):
        lowrank_edit_(hidden, **arguments(edit, backend=named))
    assert same_bits(hidden.detach(), before) and not ran


@backends
def test_expanded_hidden_is_fine_apart(backend, edit):
    hidden = edit.hidden[:1].expand(edit.hidden.shape)
    out = lowrank_edit(hidden, **arguments(edit, backend=backend))
    assert same_bits(out, lowrank_edit(hidden.contiguous(), **arguments(edit, backend=backend)))


@backends
@pytest.mark.parametrize("layout", ["sliced", "transposed", "swapped"])
def test_memory_of_any_layout_is_edited_where_it_lies(backend, layout, device):
    """Also where rows have no common stride, as in "swapped"."""
    edit = make_edit(Case(65, 3, (4, 5), layout=layout), device)
    hidden = laid_out(edit.hidden, layout)
    address = hidden.data_ptr()
    out = lowrank_edit_(hidden, **arguments(edit, backend=backend))
    assert out is hidden and out.data_ptr() == address and out.stride() == hidden.stride()
    assert same_bits(out, lowrank_edit(edit.hidden, **arguments(edit, backend=backend)))
