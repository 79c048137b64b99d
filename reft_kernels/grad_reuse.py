"""Whether a gradient may be overwritten: when nobody but the engine that hands it over holds it.

Backward rewrites n rows of an upstream gradient (N, D). A copy of all of it, 2·N·D·e bytes, is
needed only if somebody else may look at it afterwards. Autograd's engine asks itself the same when
it adds gradients up, and adds in place into one that it alone refers to
(torch/csrc/autograd/input_buffer.cpp). Python sees as much:

* the tensor's C++ references: more if another node, the caller of ``autograd.grad`` or a hook on
  the node gets the same tensor;
* its Python references: more if a hook on the tensor kept it;
* the references of its memory, and its base: more, or one, if it is a view or has views.

How many there are of each when nobody else is there depends on torch and Python, so it is not
written down but seen, in a backward pass of the same form whose gradient is certainly nobody's.
What differs from that, whatever the reason, is copied.

It also depends on how Python calls functions. While a hook evaluates frames, as torch.compile's
does in the code it runs and for good after a compilation that failed, each call keeps one more
reference to its arguments. So what was seen is kept by what a call adds.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_Facts = tuple[Any, ...]
#: :func:`_held_by_a_call` -> what :func:`_facts` says of a gradient that nobody else holds, or None
#: if this torch does not tell.
_alone: dict[int, _Facts | None] = {}


def exclusive(grad: Tensor) -> bool:
    """Whether ``grad``, an argument of a backward that calls this at once, may be overwritten."""
    if torch.compiler.is_compiling():
        return False
    alone = _alone.get(_held_by_a_call())
    return alone is not None and _facts(grad) == alone


def calibrate() -> None:
    """See what a gradient that nobody else holds looks like, once for each way of calling.

    Called in forward: a backward pass inside another would be a stranger one.
    """
    if torch.compiler.is_compiling() or (state := _held_by_a_call()) in _alone:
        return
    with torch.enable_grad():
        source = torch.ones(2, 2, device="cpu", requires_grad=True)
        if type(source.data) is not Tensor:  # a mode that replaces tensors: another time
            return
        seen: list[_Facts | None] = []
        # Two uses, so that the engine adds up two gradients into one of its own.
        middle, _ = _Probe.apply(source * 1.0, seen)  # type: ignore[no-untyped-call]
        torch.autograd.backward((middle * 2.0 + middle * 3.0).sum())
    _alone[state] = seen[0] if seen else None


def _held_by_a_call() -> int:
    """References to an argument of a Python function: more while a hook evaluates frames."""
    return _references(object())


def _references(argument: object) -> int:
    return sys.getrefcount(argument)


class _Probe(torch.autograd.Function):
    """The identity; its backward is reached as that of the edit is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[_Facts | None]) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.seen = seen  # of this calibration: another thread may be at its own
        return x.clone(), x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *of_others: Tensor | None) -> tuple[Tensor, None]:
        _look(grad, ctx.seen)
        return grad, None


def _look(grad: Tensor, seen: list[_Facts | None]) -> None:
    """As deep below its backward as :func:`exclusive` is."""
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
