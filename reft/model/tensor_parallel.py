"""Bases that several processes share: which outputs are replicated and can be edited.

Tensor parallelism splits projections inside attention and the MLP. The residual stream, and what
attention and the MLP add to it, is replicated on every process, so an edit can be computed there.
Between the projections each process holds a slice. Under pipeline or sequence parallelism a process
has only some of the blocks, or some of the tokens, of a prompt.
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

#: Styles of transformers' plans whose module returns the same full tensor on every process.
REPLICATED = {
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

#: Styles that sum the outputs of the modules inside, so that these return partial sums.
SUMMING = {"all_reduce", "moe_tp_experts", "ep_dispatch_experts"}

#: Styles that leave a module's own output as it is.
PLAIN = {"replicate", "local_params"}

#: Styles that split the sequence.
SEQUENCE = {"sequence_parallel"}


@dataclass(frozen=True)
class TensorParallelPlan:
    """Tensor or expert parallelism of a base.

    Attributes:
        size: number of processes that hold slices of a matrix.
        plan: path of a module or parameter in the base, with ``*`` for layer numbers -> its style
            in transformers' plan; None if the base was split without such a plan.
    """

    size: int
    plan: Mapping[str, str] | None = field(repr=False)

    def why_not_replicated(self, blocks: str, component: str, path: str) -> str | None:
        """The reason why a module's output differs between processes; None if it is replicated.

        Args:
            blocks: path of the list of blocks in the base.
            component: name of the module in ``ReftConfig.component``.
            path: path of the module in its block; "" for the block.
        """
        if component == "block_output":
            return None
        if self.plan is None:
            # Named components are terms of the residual sum, which is replicated.
            named = not component.startswith("module:")
            return None if named else "no plan of transformers says whether its output is whole"
        inside = f"{_with_wildcards(blocks)}.*."
        styles = {
            name.removeprefix(inside): style
            for name, style in self.plan.items()
            if name.startswith(inside) and style not in PLAIN
        }
        return _why_not_replicated(_with_wildcards(path), styles)

    def replicated(self, blocks: str, paths: Iterable[str]) -> list[str]:
        """The modules of a block whose output is replicated, of those at ``paths``."""
        return [
            path
            for path in paths
            if self.why_not_replicated(blocks, f"module:{path}", path) is None
        ]


def find_plan(model: nn.Module) -> TensorParallelPlan | None:
    """The tensor parallelism of a transformers model, or None.

    FSDP2 and DeepSpeed do not count: they gather a module's parameters while it runs.
    """
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
    mesh_sizes = [
        parameter.device_mesh.size()
        for parameter in model.parameters()
        if isinstance(parameter, DTensor)
    ]
    return TensorParallelPlan(max(mesh_sizes), None) if mesh_sizes else None


def refuse_partial_prompts(model: nn.Module) -> None:
    """Refuse a base of which each process has only some of the blocks or some of the tokens.

    Raises:
        ValueError: the base is under pipeline or sequence parallelism.
    """
    config = _distributed(model)
    if hasattr(model, "_pp_stage") or (getattr(config, "pp_size", None) or 1) > 1:
        raise ValueError(
            "base_model must not be under pipeline parallelism (DistributedConfig.pp_size), where "
            "each process has some of the blocks; split matrices (tp_size) or parameters "
            "(fsdp_size) instead"
        )
    parallel = find_plan(model)
    plan = {} if parallel is None or parallel.plan is None else parallel.plan
    sliced = sorted(name for name, style in plan.items() if style in SEQUENCE)
    if sliced or getattr(config, "enable_sequence_parallel", False):
        where = f" of {', '.join(sliced)}" if sliced else ""
        raise ValueError(
            f"base_model must not be under sequence parallelism{where}: positions are counted in "
            "whole prompts, and each process would have some of the tokens"
        )


def refuse_context_parallel() -> None:
    """Refuse a forward inside torch's ``context_parallel``, which splits the inputs.

    It is recognised by its replacement of ``scaled_dot_product_attention``.

    Raises:
        RuntimeError: context parallelism is on.
    """
    attention: Any = torch.nn.functional.scaled_dot_product_attention
    if (getattr(attention, "__module__", None) or "").startswith("torch.distributed"):
        raise RuntimeError(
            "an adapter must not be active inside torch's context_parallel: positions are counted "
            "in whole prompts, and each process has some of the tokens. Use disable_adapter(), or "
            "data, fully sharded or tensor parallelism"
        )


def refuse_incomplete_modules(base: nn.Module, paths: Iterable[str]) -> None:
    """Refuse ``modules_to_save`` that this process cannot copy, because it lacks part of them.

    Raises:
        ValueError: FSDP2 or tensor parallelism has split their parameters, or accelerate has
            offloaded them.
    """
    for path in paths:
        module = base.get_submodule(path)
        where = f"ReftConfig.modules_to_save must not name {path!r} here: "
        for name, parameter in module.named_parameters():
            if isinstance(parameter, DTensor):
                engine = "FSDP2" if _is_fsdp(base) else "tensor parallelism"
                raise ValueError(
                    f"{where}{engine} has split its {name} between processes, and an adapter "
                    "trains whole copies. Load the base unsharded and let accelerate's FSDP2 or "
                    "DeepSpeed shard it after get_reft_model, or train no modules in full"
                )
            if parameter.is_meta and any(hasattr(part, "_hf_hook") for part in module.modules()):
                raise ValueError(
                    f"{where}its {name} is offloaded, and an adapter trains a copy that is on a "
                    "device. Give it a device in device_map"
                )


def _why_not_replicated(path: str, styles: Mapping[str, str]) -> str | None:
    """The reason why the output of the module at ``path`` in a block is not replicated, given the
    styles of the block's modules and parameters; None if it is."""
    style = styles.get(path)
    above = [path[:end] for end, letter in enumerate(path) if letter == "."]
    for module in above:
        if styles.get(module) in SUMMING:
            return f"it returns a partial sum, which {module} adds up"
    if style is not None:
        return None if style in REPLICATED else f"each process has a slice of it (style {style!r})"
    inner_styles = [style for name, style in styles.items() if name.startswith(f"{path}.")]
    if inner_styles:
        gathered = any(style in REPLICATED for style in inner_styles)
        return None if gathered else "each process has a slice of it"
    # A module without a style of its own gets slices as input if its neighbours are split.
    for module in above:
        if any(name.startswith(f"{module}.") for name in styles):
            return f"it works on a slice inside {module}"
    if any("." not in name and style not in REPLICATED for name, style in styles.items()):
        return "it may work on a slice, as projections of the block itself are split"
    return None


def _with_wildcards(path: str) -> str:
    """A path with ``*`` for numbers, which is how plans write it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", path)


def _distributed(model: nn.Module) -> Any:
    """The ``DistributedConfig`` of transformers with which a model was loaded, or None."""
    if getattr(model, "_device_mesh", None) is None:
        return None
    return getattr(getattr(model, "config", None), "distributed_config", None)


def _is_fsdp(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())
