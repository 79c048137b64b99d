"""Features of vLLM that adapters do not support; an engine that uses one does not start."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def _is_parallel(name: str) -> Callable[[Any], bool]:
    return lambda config: getattr(config.parallel_config, name, 1) > 1


def _is_set(variable: str) -> bool:
    """Whether a boolean environment variable of vLLM is set."""
    return os.environ.get(variable, "0").lower() in ("1", "true")


#: Feature to a predicate: whether an engine's configuration uses it.
UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "speculative decoding": lambda c: c.speculative_config is not None,
    "pipeline parallelism": _is_parallel("pipeline_parallel_size"),
    "data parallelism inside one engine": _is_parallel("data_parallel_size"),
    "prefill context parallelism": _is_parallel("prefill_context_parallel_size"),
    "decode context parallelism": _is_parallel("decode_context_parallel_size"),
    "dual batch overlap": lambda c: bool(getattr(c.parallel_config, "enable_dbo", False)),
    "KV transfer between engines": lambda c: c.kv_transfer_config is not None,
    "KV events": lambda c: bool(getattr(c.kv_events_config, "enable_kv_cache_events", False)),
    "LoRA": lambda c: c.lora_config is not None,
    "prompts of embeddings": lambda c: bool(c.model_config.enable_prompt_embeds),
    "multimodal models": lambda c: c.model_config.multimodal_config is not None,
    "encoder-decoder models": lambda c: bool(c.model_config.is_encoder_decoder),
    "state-space and hybrid models": lambda c: bool(c.model_config.is_hybrid),
    "KV sharing fast prefill": lambda c: bool(c.cache_config.kv_sharing_fast_prefill),
    "breakable CUDA graphs": lambda c: _is_set("VLLM_USE_BREAKABLE_CUDAGRAPH"),
    "sequence parallelism": lambda c: bool(
        getattr(c.parallel_config, "use_sequence_parallel_moe", False)
    ),
}

#: The operator of the edit, at which CUDA graphs are split.
OPERATOR = "reft::edit_block"


def check_engine(config: Any) -> None:
    """Refuse unsupported features, and keep the operator out of CUDA graphs.

    A graph of a whole decoding step would also be replayed for the last token of a chunked prompt,
    without its edit. Graphs are therefore split at the operator (PIECEWISE).

    Raises:
        ValueError: an unsupported feature, by name.
    """
    for name, is_used in UNSUPPORTED.items():
        if is_used(config):
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
    """Refuse full CUDA graphs that were enabled after :func:`check_engine`.

    Raises:
        ValueError: full CUDA graphs.
    """
    mode = config.compilation_config.cudagraph_mode
    if mode is not None and mode.has_full_cudagraphs():
        raise ValueError(
            f"cudagraph_mode must be PIECEWISE or NONE with reft adapters in vLLM, got {mode.name}"
        )


def piecewise() -> Any:
    """Return vLLM's mode for graphs that are split at operators."""
    from vllm.config.compilation import CUDAGraphMode

    return CUDAGraphMode.PIECEWISE
