"""DeepSpeed for a frozen base with an adapter: refused modes, checkpoints without the base."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft.adapter.sharding import full_tensor

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor


def check_parallelism(accelerator: Accelerator) -> None:
    """Refuse engines that split sequences across ranks or replace edited modules.

    Raises:
        ValueError: context or sequence parallelism of accelerate or DeepSpeed, or DeepSpeed's
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
                f"{name} must be 1, got {size}: positions are counted in complete prompts, and "
                "each rank would have a part of the tokens; shard data or parameters instead (DDP, "
                "FSDP2, ZeRO), or matrices (transformers' tensor parallelism)"
            )
    size = (config.get("tensor_parallel") or {}).get("autotp_size") or 1
    if size > 1:
        raise ValueError(
            f"DeepSpeed's tensor_parallel.autotp_size must be 1, got {size}: it replaces modules "
            "of the base on which the edits are; load the base with transformers' "
            "distributed_config=DistributedConfig(tp_size=…) instead"
        )


def full_precision(value: Tensor) -> Tensor:
    """Return the full tensor of a parameter in the optimizer's precision.

    Every rank must call this. In bfloat16 DeepSpeed trains a float32 copy of the parameters.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    is_trainable = value.is_leaf and value.requires_grad
    full = safe_get_full_fp32_param(value) if is_trainable else None
    return full_tensor(value) if full is None else full.detach().clone()


def check_checkpoint(folder: str, under_deepspeed: bool) -> None:
    """Refuse to resume with DeepSpeed a run that was without, or vice versa.

    Args:
        folder: the checkpoint. A missing folder is not an error here.
        under_deepspeed: whether this run uses DeepSpeed.

    Raises:
        ValueError: the checkpoint was written with DeepSpeed and this run is without, or vice
            versa.
    """
    if not Path(folder).is_dir():
        return
    by_deepspeed = any(Path(folder).glob("global_step*"))
    if by_deepspeed != under_deepspeed:
        remedy = "with DeepSpeed, on as many ranks" if by_deepspeed else "without DeepSpeed"
        raise ValueError(
            "resume_from_checkpoint must be a checkpoint of the same engine; "
            f"{folder} was written {'with' if by_deepspeed else 'without'} DeepSpeed: resume it "
            f"{remedy}, or begin a new run from its adapter, "
            "ReftModel.from_pretrained(base_model, checkpoint, is_trainable=True)"
        )


def exclude_base(accelerator: Accelerator) -> None:
    """Exclude frozen parameters from the engine's checkpoints, when writing and when loading; do
    nothing without an engine."""
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    engine = getattr(wrapped, "engine", None)
    if engine is None or "save_checkpoint" in vars(engine):
        return
    engine.save_checkpoint = functools.partial(
        engine.save_checkpoint, exclude_frozen_parameters=True
    )
    engine.load_checkpoint = _NonStrictLoad(engine.load_checkpoint)


class _NonStrictLoad:
    """A ``load_checkpoint`` that accepts missing parameters, whatever its caller passes."""

    def __init__(self, load: Any) -> None:
        self.load = load

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.load(*args, **{**kwargs, "load_module_strict": False})
