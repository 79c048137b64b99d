"""The two architectures: vLLM's own classes with a hook behind each block."""

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
    """Forward hook of a block. Its output is h, a tuple that starts with h, or vLLM's pair
    (hidden, residual) whose sum is h."""

    def __init__(self, layer: int, split: bool) -> None:
        self.layer, self.split = layer, split

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        residual = output[1] if self.split else None
        torch.ops.reft.edit_block(hidden, residual, self.layer)


def edited(blocks: Any, vllm_config: VllmConfig, *, split: bool) -> Worker:
    """Put the hooks in place."""
    check_graphs(vllm_config)
    install_runner()
    text = vllm_config.model_config.hf_text_config
    for layer, block in enumerate(blocks):
        block.register_forward_hook(EditBlock(layer, split))
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
        self.reft = edited(self.model.layers, vllm_config, split=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.reft.running():
            return super().forward(*args, **kwargs)

    def get_model_state_cls(self) -> type:
        """The seam of Model Runner V2."""
        from reft.serving.vllm.runner_v2 import ReftModelState

        return ReftModelState


class ReftTransformersForCausalLM(TransformersForCausalLM):
    """A decoder of transformers in vLLM, with adapters."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        blocks = find_blocks(self.model).layers
        self.reft = edited(blocks, vllm_config, split=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.reft.running():
            hidden: Tensor = super().forward(*args, **kwargs)
        return hidden

    get_model_state_cls = ReftLlamaForCausalLM.get_model_state_cls
