"""What an engine must not be asked for beside adapters, each refused by its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def _parallel(name: str) -> Callable[[Any], bool]:
    return lambda config: getattr(config.parallel_config, name, 1) > 1


def _environment(name: str) -> bool:
    """A switch of vLLM's, in the environment."""
    return os.environ.get(name, "0").lower() in ("1", "true")


#: What is refused -> whether an engine asks for it.
REFUSED: dict[str, Callable[[Any], bool]] = {
    "speculative decoding": lambda c: c.speculative_config is not None,
    "pipeline parallelism": _parallel("pipeline_parallel_size"),
    "data parallelism inside one engine": _parallel("data_parallel_size"),
    "prefill context parallelism": _parallel("prefill_context_parallel_size"),
    "decode context parallelism": _parallel("decode_context_parallel_size"),
    "dual batch overlap": lambda c: bool(getattr(c.parallel_config, "enable_dbo", False)),
    "KV transfer between engines": lambda c: c.kv_transfer_config is not None,
    "KV events": lambda c: bool(getattr(c.kv_events_config, "enable_kv_cache_events", False)),
    "LoRA": lambda c: c.lora_config is not None,
    "prompts of embeddings": lambda c: bool(c.model_config.enable_prompt_embeds),
    "multimodal models": lambda c: c.model_config.multimodal_config is not None,
    "encoder-decoder models": lambda c: bool(c.model_config.is_encoder_decoder),
    "state-space and hybrid models": lambda c: bool(c.model_config.is_hybrid),
    "KV sharing fast prefill": lambda c: bool(c.cache_config.kv_sharing_fast_prefill),
    "breakable CUDA graphs": lambda c: _environment("VLLM_USE_BREAKABLE_CUDAGRAPH"),
    "sequence parallelism": lambda c: bool(
        getattr(c.parallel_config, "use_sequence_parallel_moe", False)
    ),
}

#: The operator, as a piece that CUDA graphs leave out.
OPERATOR = "reft::edit_block"


def check_engine(config: Any) -> None:
    """Refuse what was not proved; keep the operator out of CUDA graphs.

    A captured graph of a whole decode step would also be replayed for the last token of a prompt
    that came in chunks, without its edit: graphs are cut at the operator (PIECEWISE).

    Raises:
        ValueError: naming what cannot be had beside adapters.
    """
    for name, asked in REFUSED.items():
        if asked(config):
            raise ValueError(f"{name} cannot be used with reft adapters in vLLM; switch it off")
    compilation = config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is None or mode.has_full_cudagraphs():
        compilation.cudagraph_mode = piecewise()
    if compilation.splitting_ops is None:
        compilation.splitting_ops = list(compilation._attention_ops)
    if compilation.splitting_ops and OPERATOR not in compilation.splitting_ops:
        compilation.splitting_ops.append(OPERATOR)


def check_graphs(config: Any) -> None:
    """Refuse graphs of whole steps, whoever asked for them after :func:`check_engine`.

    Raises:
        ValueError: CUDA graphs of whole steps.
    """
    mode = config.compilation_config.cudagraph_mode
    if mode is not None and mode.has_full_cudagraphs():
        raise ValueError(
            f"cudagraph_mode must be PIECEWISE or NONE with reft adapters in vLLM, got {mode.name}"
        )


def piecewise() -> Any:
    """vLLM's name for graphs cut at operators."""
    from vllm.config.compilation import CUDAGraphMode

    return CUDAGraphMode.PIECEWISE
