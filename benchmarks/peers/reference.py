"""The reference implementation in plain PyTorch: eager, and under ``torch.compile``."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import ModelCase, OpCase
from benchmarks.peers import Absent, Operator, Peer, Wrapped
from benchmarks.peers.ours import config
from reft.adapter.parameters import AdapterParameters
from reft.model.blocks import find_blocks
from reft_kernels import RowPlan
from reft_kernels.devtools.testing import PARAMETERS, Edit
from reft_kernels.reference import lowrank_edit


def edit(compiled: bool, case: OpCase, edit: Edit) -> Operator:
    """Build the out-of-place reference."""
    function: Callable[..., Tensor] = _static_edit if compiled else lowrank_edit
    if compiled:
        if edit.hidden.device.type == "cpu" and not (
            shutil.which("g++") or shutil.which("clang++")
        ):
            raise Absent("torch.compile needs a C++ compiler on a CPU")
        # Static shapes: compiling again for each case avoids slower code for dynamic shapes.
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, dynamic=False)
    leaves = {name: getattr(edit, name).clone().requires_grad_() for name in PARAMETERS}

    def call(hidden: Tensor) -> Tensor:
        if compiled:
            return function(hidden, edit.plan.rows, edit.plan.offsets, *leaves.values())
        return function(hidden, edit.plan, *leaves.values(), **edit.options)

    # The eager reference synchronises with the device in ``rows[rows >= 0]``.
    return Operator(call, leaves, within_budget=not compiled, capturable=compiled)


def _static_edit(
    hidden: Tensor,
    rows: Tensor,
    offsets: tuple[int, ...],
    encode: Tensor,
    bias: Tensor,
    decode: Tensor,
) -> Tensor:
    """The reference for plans without padding rows (−1).

    Without the search for −1, whose result has a data-dependent size, it compiles into one graph.
    """
    flat = out = hidden.reshape(-1, hidden.shape[-1])
    stacked = [matrix if matrix.ndim == 3 else matrix.unsqueeze(0) for matrix in (encode, decode)]
    biases = bias if bias.ndim == 2 else bias.unsqueeze(0)
    for k, (begin, end) in enumerate(itertools.pairwise(offsets)):
        edited = rows[begin:end]
        h = flat[edited].float()
        weight, rotation = (matrices[k].float() for matrices in stacked)
        coeffs = h @ weight.T + biases[k] - h @ rotation.T
        out = out.index_copy(0, edited, (h + coeffs @ rotation).to(hidden.dtype))
    return out.reshape(hidden.shape)


def wrap(tied: bool, base: nn.Module, case: ModelCase) -> Wrapped:
    """Put the reference in a forward hook of each block; the loss of ours must equal its loss."""
    torch.manual_seed(0)
    settings = config(case, tied)
    base.requires_grad_(False)
    device = next(base.parameters()).device
    adapter = AdapterParameters(settings, tuple(case.edited_layers), case.hidden, device=device)
    current: dict[str, Any] = {}

    def hook(index: int, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        encode, bias, decode, _, _ = current["weights"][index]
        edited = lowrank_edit(hidden, current["plan"], encode, bias, decode)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    blocks = find_blocks(base).layers
    for index, layer in enumerate(case.edited_layers):
        blocks[layer].register_forward_hook(partial(hook, index))

    def compute_loss(batch: Mapping[str, Tensor]) -> Tensor:
        current["weights"] = adapter()
        current["plan"] = edited_rows(case, batch, settings.num_groups)
        loss: Tensor = base(**batch).loss
        return loss

    return Wrapped(compute_loss, list(adapter.parameters()), adapter, same_as_reference=True)


def edited_rows(case: ModelCase, batch: Mapping[str, Tensor], groups: int) -> RowPlan:
    """The edited rows of a case; with two groups, the end of each prompt is the second group.

    The rule is written out here, independently of the library.
    """
    size, columns = batch["input_ids"].shape
    length = prompt_length(case)
    first, last = ends(case.positions, length)
    positions = torch.tensor([*range(first), *range(length - last, length)])
    rows = torch.arange(size).unsqueeze(1) * columns + positions
    owners = ((torch.arange(first + last) >= first) & (groups == 2)).long().expand(size, -1)
    plan = RowPlan.from_rows(rows.reshape(-1), owners.reshape(-1), groups)
    return plan.to(batch["input_ids"].device)


def prompt_length(case: ModelCase) -> int:
    """Half of the sequence; all of it for a classifier."""
    return case.sequence if case.model == "roberta" else case.sequence // 2


def ends(positions: str, length: int) -> tuple[int, int]:
    """Numbers of positions at both ends: (7, 7) for "f7+l7", (``length``, 0) for "prompt"."""
    if positions == "prompt":
        return length, 0
    counts = {"f": 0, "l": 0}
    for part in positions.split("+"):
        counts[part[0]] = int(part[1:])
    return counts["f"], counts["l"]


PEERS = (
    Peer("reference", edit=partial(edit, False), wrap=partial(wrap, True)),
    Peer("reference, compiled", edit=partial(edit, True)),
)
