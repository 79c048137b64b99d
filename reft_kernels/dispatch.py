"""Which implementation computes an edit, and why.

``auto`` takes Triton on a GPU and the torch path elsewhere. A backend named by hand works or raises
with the reason; it never turns into another one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from reft_kernels import _triton, transforms
from reft_kernels.activations import TRITON_ACTIVATIONS

Backend = Literal["auto", "triton", "torch", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)

#: Largest rank the kernels hold on chip.
MAX_TRITON_RANK = 256
#: Most groups of a plan: the second dimension of a CUDA grid.
MAX_TRITON_GROUPS = 65535


class Choice(NamedTuple):
    """A backend and the reason for it."""

    backend: str
    reason: str


def choose(
    backend: str, hidden: Tensor, decode: Tensor, activation: str | None, num_groups: int
) -> Choice:
    """The backend an edit of ``hidden`` runs on.

    Raises:
        ValueError: an unknown backend, or a named one that cannot do this edit.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend in ("torch", "reference"):
        return Choice(backend, "named by the caller")
    obstacle = triton_obstacle(hidden, decode, activation, num_groups)
    if backend == "triton":
        if obstacle is not None:
            raise ValueError(f"backend 'triton' cannot do this edit: {obstacle}")
        return Choice("triton", "named by the caller")
    if obstacle is not None:
        return Choice("torch", obstacle)
    if not hidden.is_cuda:
        return Choice("torch", f"hidden is on {hidden.device}; interpreted kernels are for tests")
    return Choice("triton", f"hidden is on {hidden.device}")


def triton_obstacle(
    hidden: Tensor, decode: Tensor, activation: str | None, num_groups: int
) -> str | None:
    """Why the Triton kernels cannot do this edit, or None."""
    if activation is not None and activation not in TRITON_ACTIVATIONS:
        known = ", ".join(sorted(TRITON_ACTIVATIONS))
        return f"activation {activation!r} has no Triton branch (there are {known})"
    if decode.shape[-2] > MAX_TRITON_RANK:
        return f"rank {decode.shape[-2]} is above {MAX_TRITON_RANK}"
    if num_groups > MAX_TRITON_GROUPS:
        return f"the plan has {num_groups} groups, more than {MAX_TRITON_GROUPS}"
    if hidden.is_cuda and torch.float64 in (hidden.dtype, decode.dtype):
        return "float64 is computed by PyTorch on a GPU"
    if transforms.active():
        return "torch.func and forward-mode differentiation see no kernels"
    return _triton.missing(hidden.device.type)
