"""The two architectures: vLLM's classes with a hook on each block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.transformers import TransformersForCausalLM

from reft.model.blocks import find_blocks
from reft.serving.vllm.compatibility import check_graphs
from reft.serving.vllm.patches import install_runner
from reft.serving.vllm.settings import Settings
from reft.serving.vllm.worker import Worker


class EditBlock:
    """Forward hook that edits the output of a block.

    Args:
        layer: the number of the block.
        has_residual: whether the output is vLLM's pair (hidden, residual), whose sum is h;
            otherwise it is h, or a tuple that starts with h.
    """

    def __init__(self, layer: int, has_residual: bool) -> None:
        self.layer, self.has_residual = layer, has_residual

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        residual = output[1] if self.has_residual else None
        torch.ops.reft.edit_block(hidden, residual, self.layer)


def add_hooks(blocks: Any, vllm_config: VllmConfig, *, has_residual: bool) -> Worker:
    """Register a hook on each block, and make the worker that plans the edits."""
    check_graphs(vllm_config)
    install_runner()
    text = vllm_config.model_config.hf_text_config
    for layer, block in enumerate(blocks):
        block.register_forward_hook(EditBlock(layer, has_residual))
    return Worker(
        Settings.of(vllm_config.additional_config),
        text.num_hidden_layers,
        text.hidden_size,
        vllm_config.device_config.device,
    )


class ReftLlamaForCausalLM(LlamaForCausalLM):
    """vLLM's Llama with adapters."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.reft = add_hooks(self.model.layers, vllm_config, has_residual=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.reft.running():
            return super().forward(*args, **kwargs)

    def get_model_state_cls(self) -> type:
        """Return the state class for Model Runner V2."""
        from reft.serving.vllm.runner_v2 import ReftModelState

        return ReftModelState


class ReftTransformersForCausalLM(TransformersForCausalLM):
    """A decoder of transformers in vLLM, with adapters."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        blocks = find_blocks(self.model).layers
        self.reft = add_hooks(blocks, vllm_config, has_residual=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.reft.running():
            hidden: Tensor = super().forward(*args, **kwargs)
        return hidden

    get_model_state_cls = ReftLlamaForCausalLM.get_model_state_cls
