"""How a base is spread over processes, and what of it is whole on each of them.

Tensor parallelism splits projections inside attention and the MLP; what these add to the residual
stream, and the stream itself, is whole on every process, and so can be edited there. Between the
projections each process holds a slice. Pipelines and split sequences leave a process with some of
the blocks, or some of the tokens, of a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

#: Styles of transformers' plans whose module returns a whole tensor.
WHOLE = {
    "rowwise",
    "rowwise_rep",
    "rowwise_split_input",
    "colwise_rep",
    "colwise_gather_output",
    "embedding_rowwise",
    "embedding_colwise",
    "all_reduce",
    "moe_tp_experts",
    "ep_dispatch_experts",
}

#: Styles that add up what the modules inside return, which are parts of a sum.
SUMMING = {"all_reduce", "moe_tp_experts", "ep_dispatch_experts"}

#: Styles that leave a module's own output as it is.
PLAIN = {"replicate", "local_params"}

#: Styles that split a sequence.
SEQUENCE = {"sequence_parallel"}


@dataclass(frozen=True)
class TensorParallelPlan:
    """Tensor or expert parallelism of a base.

    Attributes:
        size: the number of processes that hold slices of a matrix.
        plan: path of a module or parameter in the base, layer numbers written as ``*`` -> its
            style, as transformers names them; None where somebody else has split the base.
    """

    size: int
    plan: Mapping[str, str] | None = field(repr=False)

    def obstacle(self, blocks: str, component: str, path: str) -> str | None:
        """Why the output of a module is not whole on every process; None if it is.

        Args:
            blocks: path of the list of blocks in the base.
            component: as a configuration names it.
            path: of the module in its block; "" for the block.
        """
        if component == "block_output":
            return None
        if self.plan is None:
            # By what they mean, these are parts of the residual sum, which is whole.
            known = not component.startswith("module:")
            return None if known else "no plan of transformers' says whether its output is whole"
        inside = f"{_generic(blocks)}.*."
        styles = {
            name.removeprefix(inside): style
            for name, style in self.plan.items()
            if name.startswith(inside) and style not in PLAIN
        }
        return _obstacle(_generic(path), styles)

    def whole(self, blocks: str, paths: Iterable[str]) -> list[str]:
        """Those of the modules of a block whose output is whole."""
        return [one for one in paths if self.obstacle(blocks, f"module:{one}", one) is None]


def find_split(model: nn.Module) -> TensorParallelPlan | None:
    """Which tensor parallelism a transformers model is under, None for none. Parameters that FSDP2
    or DeepSpeed hold in parts are whole while a module runs, and so no split."""
    config = _distributed(model)
    if config is not None:
        sizes = {kind: getattr(config, f"{kind}_size", None) or 1 for kind in ("tp", "ep")}
        experts = getattr(config, "enable_expert_parallel", False)
        plan: dict[str, str] = {}
        if sizes["tp"] > 1:
            plan |= getattr(model, "tp_plan", None) or {}
        if sizes["ep"] > 1 or (experts and sizes["tp"] > 1):
            plan |= getattr(model, "ep_plan", None) or getattr(model, "_ep_plan", None) or {}
        size = max(sizes.values())
        return TensorParallelPlan(size, plan) if size > 1 else None
    if _is_fsdp(model):
        return None
    sizes_of = [one.device_mesh.size() for one in model.parameters() if isinstance(one, DTensor)]
    return TensorParallelPlan(max(sizes_of), None) if sizes_of else None


def refuse_parts(model: nn.Module) -> None:
    """Refuse a base of which a process has some of the blocks or some of the tokens.

    Raises:
        ValueError: pipeline parallelism, sequence parallelism.
    """
    config = _distributed(model)
    if hasattr(model, "_pp_stage") or (getattr(config, "pp_size", None) or 1) > 1:
        raise ValueError(
            "base_model must not be under pipeline parallelism (DistributedConfig.pp_size), where "
            "each process has some of the blocks; split matrices (tp_size) or parameters "
            "(fsdp_size) instead"
        )
    split = find_split(model)
    plan = {} if split is None or split.plan is None else split.plan
    sliced = sorted(name for name, style in plan.items() if style in SEQUENCE)
    if sliced or getattr(config, "enable_sequence_parallel", False):
        where = f" of {', '.join(sliced)}" if sliced else ""
        raise ValueError(
            f"base_model must not be under sequence parallelism{where}: positions are counted in "
            "whole prompts, and each process would have some of the tokens"
        )


def refuse_context_parallel() -> None:
    """Refuse a forward inside torch's ``context_parallel``, which has cut the inputs.

    Raises:
        RuntimeError: it is on. It replaces PyTorch's attention, which is how it is seen.
    """
    attention: Any = torch.nn.functional.scaled_dot_product_attention
    if (getattr(attention, "__module__", None) or "").startswith("torch.distributed"):
        raise RuntimeError(
            "an adapter must not be active inside torch's context_parallel: positions are counted "
            "in whole prompts, and each process has some of the tokens. Use disable_adapter(), or "
            "data, fully sharded or tensor parallelism"
        )


def refuse_absent_heads(base: nn.Module, paths: Iterable[str]) -> None:
    """Refuse modules to save that a process has not got whole, so that it cannot copy them.

    Raises:
        ValueError: FSDP2 or tensor parallelism has split their parameters, or accelerate keeps
            them elsewhere.
    """
    for path in paths:
        module = base.get_submodule(path)
        where = f"ReftConfig.modules_to_save must not name {path!r} here: "
        for name, one in module.named_parameters():
            if isinstance(one, DTensor):
                engine = "FSDP2" if _is_fsdp(base) else "tensor parallelism"
                raise ValueError(
                    f"{where}{engine} has split its {name} between processes, and an adapter "
                    "trains whole copies. Load the base unsharded and let accelerate's FSDP2 or "
                    "DeepSpeed shard it after get_reft_model, or train no modules in full"
                )
            if one.is_meta and any(hasattr(part, "_hf_hook") for part in module.modules()):
                raise ValueError(
                    f"{where}its {name} is offloaded, and an adapter trains a copy that is on a "
                    "device. Give it one in device_map"
                )


def _obstacle(path: str, styles: Mapping[str, str]) -> str | None:
    """Of a module of a block, given the styles in this block."""
    own = styles.get(path)
    above = [path[:end] for end, letter in enumerate(path) if letter == "."]
    for module in above:
        if styles.get(module) in SUMMING:
            return f"it returns a part of the sum that {module} is"
    if own is not None:
        return None if own in WHOLE else f"each process has a slice of it (style {own!r})"
    within = [style for name, style in styles.items() if name.startswith(f"{path}.")]
    if within:
        closed = any(style in WHOLE for style in within)
        return None if closed else "each process has a slice of it"
    # Split by nothing itself, it is fed slices where its neighbours are split.
    for module in above:
        if any(name.startswith(f"{module}.") for name in styles):
            return f"it works on a slice inside {module}"
    if any("." not in name and style not in WHOLE for name, style in styles.items()):
        return "it may work on a slice, as projections of the block itself are split"
    return None


def _generic(path: str) -> str:
    """A path as plans write it, with ``*`` for numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", path)


def _distributed(model: nn.Module) -> Any:
    """transformers' ``DistributedConfig`` of a model that was loaded with one."""
    if getattr(model, "_device_mesh", None) is None:
        return None
    return getattr(getattr(model, "config", None), "distributed_config", None)


def _is_fsdp(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())
