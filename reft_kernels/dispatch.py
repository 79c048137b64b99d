"""Choose the implementation that computes an edit, with a reason.

``auto`` uses Triton on a GPU and the torch backend elsewhere. A backend named by the caller runs or
raises with the reason; another one never replaces it.

Transforms of ``torch.func`` (grad, jvp, vmap, …) pass tensors that stand for others, and
forward-mode differentiation attaches a tangent to a tensor. A kernel sees neither, so within them
only PyTorch's own operators may run.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from reft_kernels import _triton
from reft_kernels.activations import TRITON_ACTIVATIONS
from reft_kernels.rows import RowPlan
from reft_kernels.spec import EditWeights

Backend = Literal["auto", "triton", "torch", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)

#: Largest rank the kernels hold on chip.
MAX_TRITON_RANK = 256
#: Largest number of groups of a plan: the second dimension of a CUDA grid.
MAX_TRITON_GROUPS = 65535


class Choice(NamedTuple):
    """A backend and the reason for it."""

    backend: str
    reason: str


def choose(backend: str, hidden: Tensor, plan: RowPlan, weights: EditWeights) -> Choice:
    """Choose the backend for a checked edit of ``hidden``.

    Raises:
        ValueError: an unknown backend, or a named one that cannot compute this edit.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend in ("torch", "reference"):
        return Choice(backend, "named by the caller")
    if backend == "auto" and not hidden.is_cuda:
        return Choice("torch", f"hidden is on {hidden.device}; the kernels need CUDA or ROCm")
    reason = why_not_triton(hidden, plan, weights)
    if backend == "triton":
        if reason is not None:
            raise ValueError(f"backend 'triton' cannot do this edit: {reason}")
        return Choice("triton", "named by the caller")
    if reason is not None:
        return Choice("torch", reason)
    return Choice("triton", f"hidden is on {hidden.device}")


def why_not_triton(hidden: Tensor, plan: RowPlan, weights: EditWeights) -> str | None:
    """Return the reason why the Triton kernels cannot compute this edit, or None."""
    activation, decode = weights.activation, weights.decode
    if activation is not None and activation not in TRITON_ACTIVATIONS:
        known = ", ".join(sorted(TRITON_ACTIVATIONS))
        return f"activation {activation!r} has no Triton branch (there are {known})"
    if decode.shape[-2] > MAX_TRITON_RANK:
        return f"rank {decode.shape[-2]} is above {MAX_TRITON_RANK}"
    if plan.num_groups > MAX_TRITON_GROUPS:
        return f"the plan has {plan.num_groups} groups, more than {MAX_TRITON_GROUPS}"
    if hidden.is_cuda and torch.float64 in (hidden.dtype, decode.dtype):
        return "float64 is computed by PyTorch on a GPU"
    if within_transform():
        return "torch.func and forward-mode differentiation see no kernels"
    return _triton.why_not(hidden.device.type)


def within_transform() -> bool:
    """Whether this code, or the code being traced, runs within a transform of ``torch.func`` or
    forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_batched(grad: Tensor) -> bool:
    """Whether ``grad`` holds a batch of gradients, made by ``is_grads_batched=True``."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)
