"""The hooks: two on the model that take this library's arguments and forget them, two on the stack
of blocks that make the plan of a forward and forget it, one on each edited module that follows it.

They are objects, not closures, so that a copied or pickled model has hooks on its own blocks.
"""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reft.adapter.device_cache import EditSite
from reft.adapter.edit_weights import map_tensors
from reft.model.activation_checkpointing import keep_plans
from reft.model.cached_edits import note_edits
from reft.model.call_state import OPTIONS, Options
from reft.model.choices import one_a_text
from reft.model.dropout import dropped_edit
from reft.model.forward_plan import Edit, ForwardPlan
from reft.model.planner import plan_forward
from reft.model.tensor_parallel import refuse_context_parallel
from reft_kernels import lowrank_edit, lowrank_edit_

if TYPE_CHECKING:
    from reft.model.registry import AdapterRegistry

#: The keyword under which the plan travels to the blocks, where the architecture hands keywords on.
KEYWORD = "reft_plan"

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Call:
    """Base of the hooks that look at a module's arguments by name."""

    def __init__(self, registry: AdapterRegistry, module: nn.Module) -> None:
        self.registry = registry
        parameters = inspect.signature(module.forward).parameters.values()
        self.names = [
            one.name
            for one in parameters
            if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        ]
        self.takes_keywords = any(one.kind is one.VAR_KEYWORD for one in parameters)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


class TakeOptions(_Call):
    """Forward pre-hook of the model: takes out this library's arguments.

    Args:
        outermost: whether nothing around the module has taken any: PEFT's wrapper calls the model.
    """

    def __init__(self, registry: AdapterRegistry, module: nn.Module, outermost: bool) -> None:
        super().__init__(registry, module)
        self.outermost = outermost

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments:
        kwargs = dict(kwargs)
        call = self.registry.call
        if not torch.compiler.is_compiling():
            self.registry.enter()
        # What an interrupted call has left, since no hook is run behind it, is not taken.
        outer = Options() if self.outermost else call.options or Options()
        taken = {name: kwargs.pop(name, getattr(outer, name)) for name in OPTIONS}
        named = self._named(args, kwargs)
        call.options = Options(**taken, labels=named.get("labels"))
        if self.registry.sites.choices and self.outermost:
            ids = named.get("input_ids")
            tokens = named.get("inputs_embeds") if ids is None else ids
            if isinstance(tokens, Tensor) and tokens.ndim > 2:
                call.options = one_a_text(call.options, tokens.shape[1])
        return args, kwargs


class MakePlan(_Call):
    """Forward pre-hook of the stack of blocks: makes the plan, sends it off."""

    def __call__(
        self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments:
        if KEYWORD in kwargs:  # made by the module of PEFT's that calls this one
            return args, kwargs
        if not torch.compiler.is_compiling():
            self.registry.enter()
        plan = plan_forward(self.registry, stack, self._named(args, kwargs))
        if plan is not None and not torch.compiler.is_compiling():
            refuse_context_parallel()
            if self.registry.call.watched is not None:
                self.registry.call.watched.append(plan)
        self.registry.call.current = plan
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            keep_plans(self.registry)
        # None is sent too while gradients are recorded: a block run again in backward must be able
        # to tell "nothing to edit" from "the plan was lost".
        if self.takes_keywords and (plan is not None or torch.is_grad_enabled()):
            kwargs = {**kwargs, KEYWORD: plan}
        return args, kwargs


class Forget:
    """Forward hook, run even if the forward fails: clears one attribute of the call."""

    def __init__(self, registry: AdapterRegistry, name: str) -> None:
        self.registry, self.name = registry, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self.registry.call
        setattr(call, self.name, None)
        if call.options is None and not torch.compiler.is_compiling():
            self.registry.running.threads.discard(threading.get_ident())


class ForgetPlan(Forget):
    """Forward hook of the stack: notes on the cache what was edited, and clears the plan."""

    def __init__(self, registry: AdapterRegistry) -> None:
        super().__init__(registry, "current")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        plan = self.registry.call.current
        if plan is not None and output is not None and not torch.compiler.is_compiling():
            note_edits(plan, output)
        super().__call__(module, args, output)


class EditOutput:
    """Forward hook of a block or of a part of it: h' = h + Rᵀ(act(W h + b) − σ R h) on the rows of
    the plan.

    Raises:
        RuntimeError: the module is run again in backward and its plan did not come with it.
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
            # Only the first may find memory that is not its own to write.
            edited = _apply(edit, edited, in_place or edited is not hidden)
        if edited is hidden:
            return None
        if isinstance(output, (tuple, list)):
            return type(output)([edited, *output[1:]])
        return edited

    def _plan(self, module: nn.Module, kwargs: dict[str, Any]) -> ForwardPlan | None:
        sent = KEYWORD in kwargs
        plan: ForwardPlan | None = kwargs[KEYWORD] if sent else self.registry.call.current
        if torch.compiler.is_compiling():
            return plan
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not sent and not self.registry.call.restored:
            raise RuntimeError(
                f"block {self.site[0]} ({type(module).__name__}) is run again in backward and its "
                "plan was not sent to it. Switch activation checkpointing on with "
                "ReftModel.gradient_checkpointing_enable, not with the base model's, or off"
            )
        if plan is not None and plan.recorded:
            if not torch.is_grad_enabled():
                plan.replayed = True
            elif in_backward and plan.replayed:
                return plan.again()
        return plan


def _check_output(site: EditSite, hidden: Any, plan: ForwardPlan, dim: int) -> None:
    where = f"block {site[0]}" if site[1] == "block_output" else f"{site[1]} of block {site[0]}"
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"{where} must return a tensor or a tuple that starts with one, "
            f"got {type(hidden).__name__}"
        )
    batch, columns = plan.shape
    flat = hidden.ndim == 2 and hidden.shape[0] == batch * columns
    batched = hidden.ndim == 3 and tuple(hidden.shape[:2]) == plan.shape
    if not (flat or batched) or hidden.shape[-1] != dim:
        raise ValueError(
            f"{where} must return (batch, columns, D) = ({batch}, {columns}, {dim}) for this "
            f"input, got shape {tuple(hidden.shape)}"
        )


def _may_write(hidden: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether the edit may be written into a block's output.

    A residual sum saves none of its output, so autograd lets it be overwritten, and where it would
    not, it says so. Not overwritten: a leaf, views while gradients are recorded, and what the
    block was given.
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
        weights = map_tensors(lambda tensor: tensor.to(torch.float32), weights)
    if edit.dropout:
        return dropped_edit(
            hidden, edit.rows, weights, p=edit.dropout, on=edit.dropout_on, in_place=in_place
        )
    operator = lowrank_edit_ if in_place else lowrank_edit
    encode, bias, decode, subtract, activation = weights
    return operator(
        hidden, edit.rows, encode, bias, decode, subtract=subtract, activation=activation
    )


def extended_signature(base_model: nn.Module) -> inspect.Signature:
    """The base's signature with this library's keywords."""
    own = inspect.signature(base_model.forward)
    parameters = list(own.parameters.values())
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in OPTIONS
        if name not in own.parameters
    ]
    rest = len(parameters)
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        rest -= 1
    return own.replace(parameters=[*parameters[:rest], *extra, *parameters[rest:]])
