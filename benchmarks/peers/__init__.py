"""Peers: the libraries and baselines that are measured, with versions and reasons for absence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import ModelCase, OpCase, RotationCase
from reft_kernels.devtools.testing import Edit


class Absent(Exception):
    """Raised where a peer cannot take part; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Operator:
    """The edit as a peer computes it.

    Attributes:
        call: maps hidden states (B, S, D), not a leaf, to edited hidden states.
        leaves: trainable tensors by name: "encode", "bias", "decode" (with ".T" if stored
            transposed), or other names.
        within_budget: whether the error budget of the test suite applies, instead of the tolerance
            for other libraries.
        capturable: False if a call synchronises with the device, which a CUDA graph cannot hold.
    """

    call: Callable[[Tensor], Tensor]
    leaves: Mapping[str, Tensor]
    within_budget: bool = False
    capturable: bool = True


@dataclass(frozen=True, slots=True)
class Rotation:
    """Orthonormal R of all layers.

    Attributes:
        call: returns R of each layer, (r, D) or (D, r).
        leaves: the free parameters.
        buffers: bytes of buffers beside the parameters.
    """

    call: Callable[[], Sequence[Tensor]]
    leaves: Sequence[Tensor]
    buffers: int


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A base model with an adapter, ready to train.

    Attributes:
        loss: maps a batch (``input_ids``, ``attention_mask``, ``labels``) to a differentiable loss.
        parameters: the trainable parameters.
        model: the wrapped model.
        generate: maps (prompt ids, number of new tokens) to sequences; None if not supported.
        save: writes the adapter to a folder; None if not supported.
        same_as_reference: whether the loss must equal that of the reference with the same weights.
    """

    loss: Callable[[Mapping[str, Tensor]], Tensor]
    parameters: Sequence[nn.Parameter]
    model: Any
    generate: Callable[[Tensor, int], Tensor] | None = None
    save: Callable[[str], object] | None = None
    same_as_reference: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer and its builders; a builder raises :class:`Absent` where the peer cannot take part.

    Attributes:
        version: the version of the library; None if the peer is not a library.
        edit: builds the operator.
        rotation: builds the orthonormal map.
        wrap: maps (base model, case) to a wrapped model.
        note: a remark for readers of the numbers.
        load: maps (base model, folder of ``Wrapped.save``) to a wrapped model.
    """

    name: str
    version: str | None = None
    edit: Callable[[OpCase, Edit], Operator] | None = None
    rotation: Callable[[RotationCase, torch.device], Rotation] | None = None
    wrap: Callable[[nn.Module, ModelCase], Wrapped] | None = None
    note: str | None = None
    load: Callable[[nn.Module, str], object] | None = None


def peers() -> tuple[Peer, ...]:
    """All peers: the frozen baseline, this library, and others."""
    from benchmarks.peers import adapters, frozen, lora, ours, pyreft, reference

    return (
        *frozen.PEERS,
        *ours.PEERS,
        *reference.PEERS,
        *pyreft.PEERS,
        *adapters.PEERS,
        *lora.PEERS,
    )
