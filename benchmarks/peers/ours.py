"""This library: its operator, its orthonormal map, and its wrapped models."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.cases import ModelCase, OpCase, RotationCase
from benchmarks.peers import Absent, Operator, Peer, Rotation, Wrapped
from benchmarks.peers.model_calls import greedy_generation, loss_of
from reft import ReftConfig, ReftModel, get_reft_model
from reft_kernels import lowrank_edit_, orthonormalize, reflector_base
from reft_kernels.devtools.testing import PARAMETERS, Edit


def edit(backend: str, case: OpCase, edit: Edit) -> Operator:
    """Build the in-place edit with the given backend."""
    if backend == "torch" and edit.hidden.device.type != "cuda":
        raise Absent("on a CPU, backend 'auto' is already torch")
    leaves = {name: getattr(edit, name).clone().requires_grad_() for name in PARAMETERS}

    def call(hidden: Tensor) -> Tensor:
        return lowrank_edit_(hidden, edit.plan, *leaves.values(), backend=backend, **edit.options)

    return Operator(call, leaves, within_budget=True)


def rotation(case: RotationCase, device: torch.device) -> Rotation:
    """Compute R of all layers in one call, around a base point of reflectors."""
    shape = (case.layers, case.dim, case.rank)
    start = torch.linalg.qr(torch.randn(shape, device=device)).Q
    base = reflector_base(start.mT)
    free = torch.zeros_like(base).normal_(std=0.02).requires_grad_()
    return Rotation(
        lambda: orthonormalize(free, base).unbind(0), [free], base.numel() * base.element_size()
    )


def config(case: ModelCase, tied: bool) -> ReftConfig:
    """The adapter configuration of a case."""
    return ReftConfig(
        intervention="loreft",
        rank=case.rank,
        positions=case.positions,
        layers=case.edited_layers,
        tied=tied or "+" not in case.positions,
    )


def wrap(tied: bool, base: nn.Module, case: ModelCase) -> Wrapped:
    """Wrap a whole model with the public interface."""
    if not tied and "+" not in case.positions:
        raise Absent(f"positions {case.positions!r} have one end, so there is nothing to untie")
    model: ReftModel = get_reft_model(base, config(case, tied))
    model.train()

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Wrapped(
        loss_of(model),
        trainable,
        model,
        greedy_generation(model, mask=False),
        model.save_pretrained,
        same_as_reference=True,
    )


PEERS = (
    Peer(
        "ours",
        edit=partial(edit, "auto"),
        rotation=rotation,
        wrap=partial(wrap, True),
        load=ReftModel.from_pretrained,
    ),
    Peer("ours, untied", wrap=partial(wrap, False)),
    Peer("ours (torch)", edit=partial(edit, "torch")),
)
