"""adapters 1.2.0: its ReFT module in a forward hook of each block.

The package does not import with transformers 5, which removed two names for downloads from the Hub
and other names for its model wrappers. Nothing is downloaded here, so the names for downloads are
restored during the import. A hook like that of the model wrapper calls the ReFT module at the
positions that the other peers edit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.cases import ModelCase, OpCase
from benchmarks.machine import installed
from benchmarks.peers import Absent, Operator, Peer, Wrapped
from benchmarks.peers.reference import ends, prompt_length
from reft.model.blocks import find_blocks
from reft_kernels.devtools.testing import Edit


@functools.cache
def _library() -> tuple[Any, Any, Any]:
    """(LoReftConfig, ReftModule, ForwardContext)."""
    import huggingface_hub
    import transformers.utils

    with ExitStack() as stack:
        for module, name in ((huggingface_hub, "HfFolder"), (transformers.utils, "is_remote_url")):
            if not hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, object, create=True))
        from adapters.configuration import LoReftConfig
        from adapters.context import ForwardContext
        from adapters.methods.reft import ReftModule
    return LoReftConfig, ReftModule, ForwardContext


def _require() -> tuple[Any, Any, Any]:
    try:
        return _library()
    except ImportError as error:
        raise Absent(f"adapters cannot be imported: {error}; see benchmarks/README.md") from None


def _module(dim: int, rank: int, first: int, last: int, tied: bool, dtype: str) -> Any:
    if dtype != "fp32":
        raise Absent("its LoReFT fails on half-precision hidden states (expects one dtype)")
    make_config, make_module, _ = _require()
    return make_module(
        dim,
        make_config(
            prefix_positions=first, suffix_positions=last, r=rank, tied_weights=tied, dropout=0.0
        ),
    )


def _context(batch: int, length: int, device: torch.device) -> Any:
    """The context that its model wrapper would pass for prompts of this length, without padding."""
    context = _require()[2](None)
    context.offsets = torch.zeros(batch, dtype=torch.int64, device=device)
    context.seqlens = torch.full((batch,), length, device=device)
    return context


def edit(case: OpCase, edit: Edit) -> Operator:
    """Build its ReftModule, which computes the orthonormal R at each of its two accesses."""
    first, last = (case.sequence, 0) if case.positions == "all" else ends(case.positions, 0)
    module = _module(case.dim, case.rank, first, last, case.groups == 1, case.dtype)
    assert edit.encode is not None and edit.bias is not None
    stacks = [
        weights if case.groups > 1 else weights[None]
        for weights in (edit.encode, edit.bias, edit.decode)
    ]
    leaves: dict[str, Tensor] = {}
    for group, (weight, bias, rotation) in enumerate(zip(*stacks, strict=True)):
        unit = module.units[group]
        with torch.no_grad():
            unit.learned_source.weight.copy_(weight)
            unit.learned_source.bias.copy_(bias)
            unit.projection.weight = rotation.cpu()
        unit.to(edit.hidden.device)
        suffix = "" if case.groups == 1 else str(group)
        leaves |= {
            f"encode{suffix}": unit.learned_source.weight,
            f"bias{suffix}": unit.learned_source.bias,
            f"free{suffix}": unit.projection.parametrizations.weight.original,
        }

    def call(hidden: Tensor) -> Tensor:
        with _context(case.batch, case.sequence, hidden.device):
            edited: Tensor = module(hidden)
        return edited

    return Operator(call, leaves, capturable=False)  # each call makes a context of new tensors


def wrap(tied: bool, base: nn.Module, case: ModelCase) -> Wrapped:
    """Put a module on every edited block."""
    if not tied and "+" not in case.positions:
        raise Absent(f"positions {case.positions!r} have one end, so there is nothing to untie")
    torch.manual_seed(0)
    base.requires_grad_(False)
    device = next(base.parameters()).device
    length = prompt_length(case)
    first, last = ends(case.positions, length)
    modules = nn.ModuleList(
        _module(case.hidden, case.rank, first, last, tied, case.dtype) for _ in case.edited_layers
    ).to(device)
    blocks = find_blocks(base).layers

    def hook(module: nn.Module, block: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (module(output[0]), *output[1:])
        return module(output)

    for layer, module in zip(case.edited_layers, modules, strict=True):
        blocks[layer].register_forward_hook(partial(hook, module))

    def compute_loss(batch: Mapping[str, Tensor]) -> Tensor:
        with _context(batch["input_ids"].shape[0], length, device):
            loss: Tensor = base(**batch).loss
        return loss

    return Wrapped(compute_loss, list(modules.parameters()), modules)


_NOTE = "its ReFT module in forward hooks: its model wrapper does not import with transformers 5"
PEERS = (
    Peer("adapters", installed("adapters"), edit, wrap=partial(wrap, True), note=_NOTE),
    Peer("adapters, untied", installed("adapters"), wrap=partial(wrap, False), note=_NOTE),
)
