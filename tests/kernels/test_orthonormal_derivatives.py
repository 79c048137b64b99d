"""Second derivatives of V ↦ R, torch.func transforms, forward mode and batched gradients."""

from __future__ import annotations

import pytest
import torch
from test_orthonormal import EXACT, bases, problem

from reft_kernels.orthonormal import orthonormalize


@bases
@pytest.mark.parametrize("shape", [(6, 3), (2, 4, 4), (3, 1)], ids=str)
def test_gradgradcheck(shape, with_base: bool, device) -> None:
    v, base, _ = problem(shape, with_base, device)
    torch.autograd.gradgradcheck(lambda x: orthonormalize(x, base), v, atol=1e-8, rtol=1e-6)


@bases
def test_gradients_with_a_graph_are_those_without(with_base: bool, device) -> None:
    v, base, grad = problem((2, 8, 3), with_base, device, torch.float32)
    rotation = orthonormalize(v, base)
    (with_graph,) = torch.autograd.grad(rotation, v, grad, create_graph=True)
    (without_graph,) = torch.autograd.grad(rotation, v, grad)
    torch.testing.assert_close(with_graph.detach(), without_graph, rtol=1e-6, atol=1e-6)
    assert with_graph.dtype == torch.float32 and not with_graph.triu().any()
    (second,) = torch.autograd.grad(with_graph.square().sum(), v)
    assert second.any() and not second.triu().any()


@bases
def test_transforms_see_every_step(with_base: bool, device) -> None:
    """Forward mode, batches, and batches of gradients, against single backward passes."""
    v, base, grad = problem((6, 3), with_base, device)
    rotation = orthonormalize(v, base)
    (d_v,) = torch.autograd.grad(rotation, v, grad, retain_graph=True)
    both = torch.stack([grad, grad.sin()])
    (batch,) = torch.autograd.grad(rotation, v, both, is_grads_batched=True)
    torch.testing.assert_close(batch[0], d_v, **EXACT)
    given = v.detach()

    def loss(x):
        return (orthonormalize(x, base) * grad).sum()

    tangent = given.cos()
    torch.testing.assert_close(torch.func.grad(loss)(given), d_v, **EXACT)
    torch.testing.assert_close(
        torch.func.jvp(loss, (given,), (tangent,))[1], (d_v * tangent).sum(), **EXACT
    )
    apart = torch.stack([orthonormalize(x, base) for x in (given, tangent)])
    stacked = torch.stack([given, tangent])
    batched = torch.func.vmap(lambda x: orthonormalize(x, base))(stacked)
    torch.testing.assert_close(batched, apart, **EXACT)
    hessian = torch.func.hessian(loss)(given)
    wanted = torch.autograd.functional.hessian(loss, given)
    torch.testing.assert_close(hessian, wanted, rtol=0, atol=1e-11)
