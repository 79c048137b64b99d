"""The floor: the frozen model, its backward cut at the first edited block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from benchmarks.cases import ModelCase
from benchmarks.peers import Peer, Wrapped
from reft.model.blocks import find_blocks


def wrap(base: nn.Module, case: ModelCase) -> Wrapped:
    """Whoever trains something at the output of the first edited block pays this much."""
    base.requires_grad_(False)

    def leaf(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].detach().requires_grad_(), *output[1:])
        return output.detach().requires_grad_()

    find_blocks(base).layers[case.edited_layers[0]].register_forward_hook(leaf)

    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = base(**batch).loss
        return found

    return Wrapped(loss, [], base)


PEERS = (
    Peer("frozen", wrap=wrap),
    Peer("frozen again", wrap=wrap, note="the same floor once more: how far the noise reaches"),
)
