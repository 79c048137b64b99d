"""Other ways to request derivatives: torch.func, forward mode, batches of gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from derivatives import NAMES, agree, backends, edited, small
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap


def losses(edit, backend, inplace=False):
    def loss(hidden, encode):
        out = edited(edit, {"hidden": hidden, "encode": encode}, backend, inplace)
        return out.sin().sum()

    return loss


def values(edit):
    return edit.hidden, edit.encode


def along(edit):
    return edit.hidden.cos(), edit.encode.cos()


def two(tensor):
    return torch.stack([tensor, tensor.sin()])


def by_tangent(edit, loss):
    """Forward mode without torch.func, beside a parameter that requires a gradient."""
    with forward_ad.dual_level():
        hidden = forward_ad.make_dual(*(each[0] for each in (values(edit), along(edit))))
        out = loss(hidden, edit.encode.clone().requires_grad_())
        return forward_ad.unpack_dual(out).tangent.detach()


TRANSFORMS = {
    "grad": lambda edit, loss: grad(loss, 1)(*values(edit)),
    "grad of grad": lambda edit, loss: grad(lambda h, w: grad(loss, 0)(h, w).square().sum(), 1)(
        *values(edit)
    ),
    "hessian": lambda edit, loss: hessian(loss, 1)(*values(edit)),
    "jvp": lambda edit, loss: jvp(loss, values(edit), along(edit))[1],
    "jvp of grad": lambda edit, loss: jvp(grad(loss, 1), values(edit), along(edit))[1],
    "jacrev": lambda edit, loss: jacrev(grad(loss, 0), 1)(*values(edit)),
    "jacfwd": lambda edit, loss: jacfwd(grad(loss, 0), 1)(*values(edit)),
    "vmap": lambda edit, loss: vmap(loss, (0, None))(two(edit.hidden), edit.encode),
    "vmap of grad": lambda edit, loss: vmap(grad(loss, 1))(two(edit.hidden), two(edit.encode)),
    "tangent": by_tangent,
    "tangents of a Hessian": lambda edit, loss: torch.autograd.functional.hessian(
        lambda w: loss(edit.hidden, w),
        edit.encode,
        vectorize=True,
        outer_jacobian_strategy="forward-mode",
    ),
}


@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "inplace"])
@pytest.mark.parametrize("way", TRANSFORMS)
def test_transforms_see_the_edit(way, inplace, device):
    edit = small(device, activation="tanh")
    expected = TRANSFORMS[way](edit, losses(edit, "reference"))
    assert expected.abs().max() > 0
    for named in ("torch", "auto"):
        agree([TRANSFORMS[way](edit, losses(edit, named, inplace))], [expected])


def test_a_batch_of_parameters(device):
    """Each edits a copy of hidden; in place PyTorch refuses, because one tensor cannot hold all."""
    edit = small(device, activation="tanh")
    rows = [losses(edit, "reference")(edit.hidden, each) for each in two(edit.encode)]
    loss = losses(edit, "torch")
    agree([vmap(loss, (None, 0))(edit.hidden, two(edit.encode))], [torch.stack(rows)])
    with pytest.raises(RuntimeError, match="vmap: inplace"):
        vmap(losses(edit, "torch", True), (None, 0))(edit.hidden, two(edit.encode))


@pytest.mark.parametrize("way", TRANSFORMS)
def test_transforms_refuse_the_kernels(way, device):
    edit = small(device, dtype=torch.float32, activation="tanh")
    with pytest.raises(ValueError, match=r"'triton' cannot do this edit: torch\.func"):
        TRANSFORMS[way](edit, losses(edit, "triton"))


@pytest.mark.parametrize("way", ["vmap", "tangent", "jvp"])
def test_transforms_see_the_entries_of_a_table(way, device):
    """A plan with slots and scales refuses gradients, but transforms work."""
    edit = small(device, groups=(2, 2, 2), activation="tanh")
    slots = torch.tensor([2, -1, 0], device=device)
    scales = torch.tensor([0.5, 1.0, 2.0], device=device)
    edit = replace(edit, plan=edit.plan.using(slots, scales))

    def frozen(backend):
        loss = losses(edit, backend)
        return lambda hidden, encode: loss(hidden, encode.detach() if way == "tangent" else encode)

    expected = TRANSFORMS[way](edit, frozen("reference"))
    agree([TRANSFORMS[way](edit, frozen("torch"))], [expected])


OF_GRAPHS = {
    "hessian": lambda f, w: torch.autograd.functional.hessian(f, w),
    "hessian of a batch": lambda f, w: torch.autograd.functional.hessian(f, w, vectorize=True),
    "hvp": lambda f, w: torch.autograd.functional.hvp(f, w, w.cos())[1],
    "vhp": lambda f, w: torch.autograd.functional.vhp(f, w, w.cos())[1],
    "jvp by two backwards": lambda f, w: torch.autograd.functional.jvp(f, w, w.cos())[1],
}


@pytest.mark.parametrize("way", OF_GRAPHS)
@backends
def test_functions_of_autograd(backend, way, device):
    edit = small(device, activation="tanh")

    def result(named):
        return OF_GRAPHS[way](lambda w: losses(edit, named)(edit.hidden, w), edit.encode)

    agree([result(backend)], [result("reference")])


@backends
def test_a_batch_of_gradients(backend, device):
    """``is_grads_batched`` puts many upstream gradients into one tensor, which no kernel reads."""
    edit = small(device, activation="gelu")
    upstream = two(edit.upstream)
    leaves = {name: getattr(edit, name).clone().requires_grad_() for name in NAMES}
    inputs = list(leaves.values())
    out = edited(edit, leaves, backend)
    batched = torch.autograd.grad(out, inputs, upstream, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad(out, inputs, each, retain_graph=True) for each in upstream]
    agree(batched, [torch.stack(pair) for pair in zip(*apart, strict=True)])


@backends
def test_a_tangent_of_the_upstream_gradient(backend, device):
    """The graph was made before forward-mode differentiation was entered."""
    edit = small(device, activation="gelu")
    encode = edit.encode.clone().requires_grad_()
    out = edited(edit, {"encode": encode}, backend)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(edit.upstream, edit.upstream.cos())
        (d_encode,) = torch.autograd.grad(out, encode, upstream, retain_graph=True)
        tangent = forward_ad.unpack_dual(d_encode).tangent
    agree([tangent], torch.autograd.grad(out, encode, edit.upstream.cos()))


@pytest.mark.traced
@pytest.mark.parametrize("way", ["jvp", "vmap"])
def test_transforms_in_a_traced_function(way, device):
    torch.compiler.reset()
    edit = small(device, activation="tanh")
    assert edit.plan.places  # made inside a transform, they would leave it

    def traced(backend):
        return torch.compile(
            lambda: TRANSFORMS[way](edit, losses(edit, backend)), backend="aot_eager"
        )()

    agree([traced("torch")], [TRANSFORMS[way](edit, losses(edit, "reference"))])
    with pytest.raises(Exception, match=r"torch\.func"):
        traced("triton")
    torch.compiler.reset()
