"""The baseline: the frozen model, with its backward cut at the first edited block."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.cases import ModelCase
from benchmarks.peers import Peer, Wrapped
from benchmarks.peers.model_calls import loss_of
from reft.model.blocks import find_blocks


def wrap(base: nn.Module, case: ModelCase) -> Wrapped:
    """Make the output of the first edited block a leaf, where the backward of an edit ends."""
    base.requires_grad_(False)

    def leaf(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].detach().requires_grad_(), *output[1:])
        return output.detach().requires_grad_()

    find_blocks(base).layers[case.edited_layers[0]].register_forward_hook(leaf)

    return Wrapped(loss_of(base), [], base)


PEERS = (
    Peer("frozen", wrap=wrap),
    Peer("frozen again", wrap=wrap, note="the frozen baseline measured a second time: the noise"),
)
