"""The three hooks: one on the model that makes the plan of a forward, one on each edited block that
follows it, one on the model that forgets it.

They are objects, not closures, so that a copied or pickled model has hooks on its own blocks.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reft.model.plan import Edit, ForwardPlan
from reft.nn.dropout import dropped_edit
from reft_kernels import lowrank_edit, lowrank_edit_

if TYPE_CHECKING:
    from reft.model.attachment import Attachment

#: The keyword under which the plan travels to the blocks, where the architecture hands keywords on.
KEYWORD = "reft_plan"


class MakePlan:
    """Forward pre-hook of the model: takes out this library's arguments, makes the plan, sends it
    off."""

    def __init__(self, attachment: Attachment, model: nn.Module) -> None:
        self.attachment = attachment
        parameters = inspect.signature(model.forward).parameters.values()
        self.names = [
            one.name
            for one in parameters
            if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        ]
        self.takes_keywords = any(one.kind is one.VAR_KEYWORD for one in parameters)

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        prompt_lengths = kwargs.pop("prompt_lengths", None)
        adapter_names = kwargs.pop("adapter_names", None)
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        plan = self.attachment.plan_forward(model, call, prompt_lengths, adapter_names)
        self.attachment.current = plan
        # None is sent too while gradients are recorded: a block run again in backward must be able
        # to tell "nothing to edit" from "the plan was lost".
        if self.takes_keywords and (plan is not None or torch.is_grad_enabled()):
            kwargs[KEYWORD] = plan
        return args, kwargs


class ForgetPlan:
    """Forward hook of the model, run even if the forward fails."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.attachment.current = None


class EditBlock:
    """Forward hook of an edited block: h' = h + Rᵀ(act(W h + b) − σ R h) on the rows of the plan.

    Raises:
        RuntimeError: the block is run again in backward and its plan did not come with it.
        TypeError, ValueError: its output is not (batch, columns, D), or a tuple that starts so.
    """

    def __init__(self, attachment: Attachment, layer: int) -> None:
        self.attachment, self.layer = attachment, layer

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        plan = self._plan(block, kwargs)
        edits = None if plan is None else plan.edits.get(self.layer)
        if plan is None or not edits:
            return None
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        _check_output(self.layer, hidden, plan)
        in_place = self.attachment.in_place and _may_write(hidden, args)
        edited = hidden
        for edit in edits:
            # Only the first may find memory that is not its own to write.
            edited = _apply(edit, edited, in_place or edited is not hidden)
        if edited is hidden:
            return None
        if isinstance(output, (tuple, list)):
            return type(output)([edited, *output[1:]])
        return edited

    def _plan(self, block: nn.Module, kwargs: dict[str, Any]) -> ForwardPlan | None:
        sent = KEYWORD in kwargs
        plan: ForwardPlan | None = kwargs[KEYWORD] if sent else self.attachment.current
        if torch.compiler.is_compiling():
            return plan
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not sent:
            raise RuntimeError(
                f"block {self.layer} ({type(block).__name__}) is run again in backward and its "
                "plan was not sent to it: this transformers checkpoints a block with its hooks, "
                "and this architecture hands no keywords to its blocks. Update transformers to "
                "5.23 or turn gradient checkpointing off"
            )
        if plan is not None and plan.recorded:
            if not torch.is_grad_enabled():
                plan.replayed = True
            elif in_backward and plan.replayed:
                return plan.again()
        return plan


def _check_output(layer: int, hidden: Any, plan: ForwardPlan) -> None:
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"block {layer} must return a tensor or a tuple that starts with one, "
            f"got {type(hidden).__name__}"
        )
    batch, columns = plan.shape
    flat = hidden.ndim == 2 and hidden.shape[0] == batch * columns
    if not flat and (hidden.ndim != 3 or tuple(hidden.shape[:2]) != plan.shape):
        raise ValueError(
            f"block {layer} must return (batch, columns, D) = ({batch}, {columns}, D) for this "
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
    rows = edit.rows
    weights: tuple[Tensor | None, ...] = (edit.encode, edit.bias, edit.decode)
    if edit.decode.device != hidden.device:  # a model spread over devices
        rows = rows.to(hidden.device)
        weights = tuple(None if one is None else one.to(hidden.device) for one in weights)
    if edit.decode.dtype not in (torch.float32, hidden.dtype):
        weights = tuple(None if one is None else one.to(torch.float32) for one in weights)
    encode, bias, decode = weights
    assert decode is not None
    how: dict[str, Any] = {"subtract": edit.subtract, "activation": edit.activation}
    if edit.dropout:
        return dropped_edit(
            hidden, rows, encode, bias, decode,
            p=edit.dropout, on=edit.dropout_on, in_place=in_place, **how,
        )  # fmt: skip
    operator = lowrank_edit_ if in_place else lowrank_edit
    return operator(hidden, rows, encode, bias, decode, **how)


def extended_signature(base_model: nn.Module) -> inspect.Signature:
    """The base's signature with this library's two keywords."""
    own = inspect.signature(base_model.forward)
    parameters = list(own.parameters.values())
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("prompt_lengths", "adapter_names")
        if name not in own.parameters
    ]
    rest = len(parameters)
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        rest -= 1
    return own.replace(parameters=[*parameters[:rest], *extra, *parameters[rest:]])
