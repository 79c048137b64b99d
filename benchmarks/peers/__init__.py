"""Who is measured. A peer says which version it is and, where it cannot take part, why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import ModelCase, OpCase, RotationCase
from reft_kernels.devtools.testing import Edit


class Absent(Exception):
    """A peer cannot take part; the message says why."""


@dataclass(frozen=True, slots=True)
class Operator:
    """The edit as one peer computes it.

    Attributes:
        call: hidden (B, S, D), no leaf, to the edited hidden.
        leaves: what is trained: "encode", "bias", "decode" (".T" if stored transposed), or others.
        own: judged by the test suite's budget, not by a foreign one.
        capturable: False where a call waits for the device, which no CUDA graph can hold.
    """

    call: Callable[[Tensor], Tensor]
    leaves: Mapping[str, Tensor]
    own: bool = False
    capturable: bool = True


@dataclass(frozen=True, slots=True)
class Rotation:
    """Orthonormal R of all layers.

    Attributes:
        call: () to a list of R, (r, D) or (D, r).
        leaves: their free parameters.
        buffers: bytes held beside the parameters.
    """

    call: Callable[[], Sequence[Tensor]]
    leaves: Sequence[Tensor]
    buffers: int


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A base model with an adapter, ready to train.

    Attributes:
        loss: a batch (``input_ids``, ``attention_mask``, ``labels``) to a loss with a graph.
        parameters: what is trained.
        model: what to save.
        generate: prompt ids, new tokens -> sequences; None where the peer cannot.
        same_as_reference: whether its loss must be the reference's, with the weights of ours.
    """

    loss: Callable[[Mapping[str, Tensor]], Tensor]
    parameters: Sequence[nn.Parameter]
    model: Any
    generate: Callable[[Tensor, int], Tensor] | None = None
    save: Callable[[str], object] | None = None
    same_as_reference: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """One peer; a builder raises :class:`Absent` where it cannot take part.

    Attributes:
        version: its version, None for what is no library.
        edit: builder of its operator.
        rotation: builder of its orthonormal map.
        wrap: builder of a whole model: (base model, case) -> Wrapped.
        note: what a reader of its numbers must know.
        load: (base model, folder that ``Wrapped.save`` wrote) -> a wrapped model.
    """

    name: str
    version: str | None = None
    edit: Callable[[OpCase, Edit], Operator] | None = None
    rotation: Callable[[RotationCase, torch.device], Rotation] | None = None
    wrap: Callable[[nn.Module, ModelCase], Wrapped] | None = None
    note: str | None = None
    load: Callable[[nn.Module, str], object] | None = None


def peers() -> tuple[Peer, ...]:
    """All of them, this library first."""
    from benchmarks.peers import adapters, frozen, lora, ours, pyreft, reference

    return (
        *frozen.PEERS,
        *ours.PEERS,
        *reference.PEERS,
        *pyreft.PEERS,
        *adapters.PEERS,
        *lora.PEERS,
    )
