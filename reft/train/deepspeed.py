"""What DeepSpeed has to be told of a frozen base with an adapter, and what it is not used for."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft.adapter.sharding import full_tensor

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor


def refuse_parts(accelerator: Accelerator) -> None:
    """Refuse engines under which a rank has some of the tokens, or replaces the modules that are
    edited.

    Raises:
        ValueError: context or sequence parallelism of accelerate's or DeepSpeed's, DeepSpeed's
            tensor parallelism.
    """
    sizes: dict[str, Any] = {}
    parallelism = getattr(accelerator, "parallelism_config", None)
    for name in ("cp_size", "sp_size"):
        sizes[f"ParallelismConfig.{name}"] = getattr(parallelism, name, None)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    config = getattr(plugin, "deepspeed_config", None) or {}
    sizes["DeepSpeed's sequence_parallel_size"] = config.get("sequence_parallel_size")
    for name, size in sizes.items():
        if (size or 1) > 1:
            raise ValueError(
                f"{name} must be 1, got {size}: positions are counted in whole prompts, and each "
                "rank would have some of the tokens; shard data or parameters instead (DDP, FSDP2, "
                "ZeRO), or matrices (transformers' tensor parallelism)"
            )
    size = (config.get("tensor_parallel") or {}).get("autotp_size") or 1
    if size > 1:
        raise ValueError(
            f"DeepSpeed's tensor_parallel.autotp_size must be 1, got {size}: it replaces modules "
            "of the base after the adapter was put on them; load the base with transformers' "
            "distributed_config=DistributedConfig(tp_size=…) instead"
        )


def precise(value: Tensor) -> Tensor:
    """All of a parameter, as precise as the optimizer keeps it: where DeepSpeed computes in
    bfloat16, what it trains is not what modules hold; by every rank."""
    from deepspeed.utils import safe_get_full_fp32_param

    trained = value.is_leaf and value.requires_grad
    full = safe_get_full_fp32_param(value) if trained else None
    return full_tensor(value) if full is None else full.detach().clone()


def check_checkpoint(folder: str, under_deepspeed: bool) -> None:
    """Refuse to resume from states that are kept in another way than this run's.

    Raises:
        ValueError: DeepSpeed wrote them and this run is without it, or the other way round.
    """
    if not Path(folder).is_dir():
        return  # said by whoever looks for it
    written = any(Path(folder).glob("global_step*"))
    if written != under_deepspeed:
        with_it, without = "with DeepSpeed, on as many ranks", "without DeepSpeed"
        raise ValueError(
            f"resume_from_checkpoint must be a run's that was started as this one; {folder} was "
            f"written {'with' if written else 'without'} DeepSpeed: resume it "
            f"{with_it if written else without}, or begin anew from its adapter, "
            "ReftModel.from_pretrained(base_model, checkpoint, is_trainable=True)"
        )


def leave_out_base(accelerator: Accelerator) -> None:
    """Let an engine write what is trained into checkpoints, not the frozen base, and miss nothing
    when it loads one; without an engine nothing happens."""
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    engine = getattr(wrapped, "engine", None)
    if engine is None or "save_checkpoint" in vars(engine):
        return
    engine.save_checkpoint = functools.partial(
        engine.save_checkpoint, exclude_frozen_parameters=True
    )
    engine.load_checkpoint = _Lenient(engine.load_checkpoint)


class _Lenient:
    """``load_checkpoint`` that is content with the trained parameters, whatever its caller asks."""

    def __init__(self, load: Any) -> None:
        self.load = load

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.load(*args, **{**kwargs, "load_module_strict": False})
