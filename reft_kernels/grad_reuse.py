"""Decide whether backward may overwrite the gradient that it is given.

Backward rewrites n rows of an upstream gradient (N, D). A copy of the whole gradient, 2·N·D·e bytes
of traffic, is needed only if somebody else may read it afterwards. Autograd's engine asks the same
question when it adds gradients, and adds in place into a gradient that only it refers to
(torch/csrc/autograd/input_buffer.cpp). Python sees enough to answer it:

* C++ references to the tensor. There are more if another node, the caller of ``autograd.grad`` or
  a hook on the node receives the same tensor.
* Python references to the tensor. There are more if a hook on the tensor kept it.
* References to its memory, and its base. A view or a tensor with views shows in these.

The counts of an unshared gradient depend on the versions of torch and Python. So they are measured
rather than hard-coded, in a backward pass of the same form whose gradient nobody else holds.
A gradient with any other counts is copied.

The counts also depend on how Python calls functions. While a hook evaluates frames, each call keeps
one more reference to its arguments. torch.compile installs such a hook in the code that it runs,
and for good after a failed compilation. So the measurements are stored by what a call adds.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_Facts = tuple[Any, ...]
#: :func:`_references_of_a_call` -> :func:`_facts` of an unshared gradient, or None if this version
#: of torch does not provide them.
_unshared: dict[int, _Facts | None] = {}

#: Whether a way of calling was met that is not measured yet; the next forward measures it.
uncalibrated = True


def exclusive(grad: Tensor) -> bool:
    """Whether ``grad`` may be overwritten. A backward must call this directly on its argument."""
    if torch.compiler.is_compiling():
        return False
    references = _references_of_a_call()
    if references not in _unshared:
        global uncalibrated
        uncalibrated = True
    unshared = _unshared.get(references)
    return unshared is not None and _facts(grad) == unshared


def calibrate() -> None:
    """Measure the facts of an unshared gradient, once for each way of calling.

    Call this in forward: a backward pass inside a backward pass would have other counts.
    """
    global uncalibrated
    if torch.compiler.is_compiling():
        return
    if (references := _references_of_a_call()) in _unshared:
        uncalibrated = False
        return
    with torch.enable_grad():
        source = torch.ones(2, 2, device="cpu", requires_grad=True)
        if type(source.data) is not Tensor:  # a mode replaces tensors: measure another time
            return
        seen: list[_Facts | None] = []
        # Two uses, so that the engine adds two gradients into one of its own.
        middle, _ = _Probe.apply(source * 1.0, seen)  # type: ignore[no-untyped-call]
        torch.autograd.backward((middle * 2.0 + middle * 3.0).sum())
    _unshared[references] = seen[0] if seen else None
    uncalibrated = False


def _references_of_a_call() -> int:
    """Count the references to an argument of a Python function: more while a hook evaluates
    frames."""
    return _references(object())


def _references(argument: object) -> int:
    return sys.getrefcount(argument)


class _Probe(torch.autograd.Function):
    """The identity, with a backward that is reached like that of the edit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[_Facts | None]) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.seen = seen  # of this calibration: another thread may calibrate at the same time
        return x.clone(), x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *other_grads: Tensor | None) -> tuple[Tensor, None]:
        _record(grad, ctx.seen)
        return grad, None


def _record(grad: Tensor, seen: list[_Facts | None]) -> None:
    """Record the facts at the call depth of :func:`exclusive`."""
    seen.append(_facts(grad))


def _facts(grad: Tensor) -> _Facts | None:
    try:
        return (
            type(grad),
            sys.getrefcount(grad),
            grad._use_count(),  # type: ignore[attr-defined]
            torch._C._storage_Use_Count(grad.untyped_storage()._cdata),
            grad._base is None,
            grad.is_contiguous(),
            grad.requires_grad,
        )
    except (AttributeError, RuntimeError, TypeError):
        return None
