"""The hook that edits the output of a block, or of a part of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reft.adapter.device_cache import EditSite
from reft.model.dropout import dropped_edit
from reft.model.forward_plan import Edit, ForwardPlan
from reft.model.registry import AdapterRegistry
from reft_kernels.functional import apply_edit

#: The keyword under which a plan travels to the blocks, where the architecture passes keywords on.
KEYWORD = "reft_plan"


class EditHook:
    """Forward hook of an edited module: h' = h + Rᵀ(act(W h + b) − σ R h) in the rows of the plan.

    It is an object, not a closure, so that a copied or pickled model has hooks on its own blocks.

    Args:
        registry: the adapters of the model.
        site: block number and component.

    Raises:
        RuntimeError: the module runs again in backward without its plan.
        TypeError, ValueError: its output is not (batch, columns, D), or a tuple that starts so.
    """

    def __init__(self, registry: AdapterRegistry, site: EditSite) -> None:
        self.registry, self.site = registry, site

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        plan = self._plan(module, kwargs)
        edits = None if plan is None else plan.edits.get(self.site)
        if plan is None or not edits:
            return None
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        _check_output(self.site, hidden, plan, edits[0].weights.decode.shape[-1])
        in_place = self.registry.in_place and _may_write(hidden, args)
        edited = hidden
        for edit in edits:
            # Later edits write into the tensor made by the first one.
            edited = _apply(edit, edited, in_place or edited is not hidden)
        if edited is hidden:
            return None
        if isinstance(output, (tuple, list)):
            return type(output)([edited, *output[1:]])
        return edited

    def _plan(self, module: nn.Module, kwargs: dict[str, Any]) -> ForwardPlan | None:
        """The plan of the forward that the module runs in."""
        call = self.registry.calls.current
        sent = KEYWORD in kwargs
        plan: ForwardPlan | None = kwargs[KEYWORD] if sent else call.plan
        if torch.compiler.is_compiling():
            return plan
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not sent and not call.restored:
            raise RuntimeError(
                f"block {self.site[0]} ({type(module).__name__}) runs again in backward without "
                "its plan. Enable activation checkpointing with "
                "ReftModel.gradient_checkpointing_enable, not with the base model's, or disable it"
            )
        if plan is not None and plan.recorded:
            if not torch.is_grad_enabled():
                plan.replayed = True
            elif in_backward and plan.replayed:
                return plan.again()
        return plan


def _check_output(site: EditSite, hidden: Any, plan: ForwardPlan, dim: int) -> None:
    """Check that a module's output has a row for each token of the forward.

    Raises:
        TypeError, ValueError: see :class:`EditHook`.
    """
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"{_name_of(site)} must return a tensor or a tuple that starts with one, "
            f"got {type(hidden).__name__}"
        )
    batch, columns = plan.shape
    flat = hidden.ndim == 2 and hidden.shape[0] == batch * columns
    batched = hidden.ndim == 3 and tuple(hidden.shape[:2]) == plan.shape
    if not (flat or batched) or hidden.shape[-1] != dim:
        raise ValueError(
            f"{_name_of(site)} must return (batch, columns, D) = ({batch}, {columns}, {dim}) for "
            f"this input, got shape {tuple(hidden.shape)}"
        )


def _name_of(site: EditSite) -> str:
    layer, component = site
    return f"block {layer}" if component == "block_output" else f"{component} of block {layer}"


def _may_write(hidden: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether the edit may be written into a block's output.

    A residual sum saves none of its output for backward, so autograd allows the write; where an
    operation did save it, autograd reports that. Never written to: a leaf, a view while gradients
    are recorded, and the block's own input.
    """
    if args and hidden is args[0]:
        return False
    if torch.compiler.is_compiling():
        return True
    if torch.is_grad_enabled():
        return not hidden._is_view() and not (hidden.is_leaf and hidden.requires_grad)
    return not (hidden._is_view() and args and hidden._base is args[0])


def _apply(edit: Edit, hidden: Tensor, in_place: bool) -> Tensor:
    weights = edit.weights
    if weights.decode.dtype not in (torch.float32, hidden.dtype):
        encode, bias, decode = weights.encode, weights.bias, weights.decode
        weights = weights._replace(
            encode=None if encode is None else encode.float(),
            bias=None if bias is None else bias.float(),
            decode=decode.float(),
        )
    if edit.dropout:
        return dropped_edit(
            hidden, edit.rows, weights, p=edit.dropout, on=edit.dropout_on, in_place=in_place
        )
    return apply_edit(hidden, edit.rows, weights, in_place=in_place)
