"""The hooks around a forward: the model's hooks take this library's arguments, those of the stack
of blocks make the plan of the forward, and both clear their state afterwards.

They are objects, not closures, so that a copied or pickled model has hooks on its own blocks.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn

from reft.model import activation_checkpointing
from reft.model.cached_edits import note_edits
from reft.model.call_state import OPTIONS, ForwardOptions
from reft.model.edit_hook import KEYWORD
from reft.model.forward_inputs import one_entry_per_text, read_inputs
from reft.model.planner import PAGED, plan_forward, plan_paged_step
from reft.model.registry import AdapterRegistry
from reft.model.tensor_parallel import refuse_context_parallel

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _ArgumentHook:
    """Base of the hooks that read a module's arguments by name."""

    def __init__(self, registry: AdapterRegistry, module: nn.Module) -> None:
        self.registry = registry
        parameters = inspect.signature(module.forward).parameters.values()
        self.names = [
            parameter.name
            for parameter in parameters
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        self.takes_keywords = any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in parameters
        )

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


class TakeOptions(_ArgumentHook):
    """Forward pre-hook of the model: takes this library's arguments out of the call.

    Args:
        outermost: no wrapper around the module, such as PEFT's, has taken any already.
    """

    def __init__(self, registry: AdapterRegistry, module: nn.Module, outermost: bool) -> None:
        super().__init__(registry, module)
        self.outermost = outermost

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments:
        kwargs = dict(kwargs)
        call = self.registry.calls.current
        _enter(self.registry)
        # A call that was interrupted has run no hook behind it: its options are not used.
        outer = ForwardOptions() if self.outermost else call.options or ForwardOptions()
        taken = {name: kwargs.pop(name, getattr(outer, name)) for name in OPTIONS}
        arguments = self._by_name(args, kwargs)
        call.options = ForwardOptions(**taken, labels=arguments.get("labels"))
        if self.registry.blocks.choices and self.outermost:
            ids = arguments.get("input_ids")
            tokens = arguments.get("inputs_embeds") if ids is None else ids
            if isinstance(tokens, Tensor) and tokens.ndim > 2:
                call.options = one_entry_per_text(call.options, tokens.shape[1])
        return args, kwargs


class MakePlan(_ArgumentHook):
    """Forward pre-hook of the stack of blocks: makes the plan and sends it to the blocks."""

    def __call__(
        self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments:
        if KEYWORD in kwargs:  # made by PEFT's module that calls this one
            return args, kwargs
        registry, call = self.registry, self.registry.calls.current
        if call.options is None:  # the stack is called by itself
            _enter(registry)
        arguments = self._by_name(args, kwargs)
        plan = None
        if any(arguments.get(name) is not None for name in PAGED):
            plan = plan_paged_step(registry, arguments)
        else:
            if registry.engine_refs:
                registry.check_engines()
            inputs = read_inputs(registry, stack, arguments)
            if inputs is not None:
                plan = plan_forward(registry, inputs)
        call.plan = plan
        if not torch.compiler.is_compiling():
            self._after_plan(plan)
        # While gradients are recorded None is sent too: a block that runs again in backward must
        # tell "nothing to edit" from "the plan was lost".
        if self.takes_keywords and (plan is not None or torch.is_grad_enabled()):
            kwargs = {**kwargs, KEYWORD: plan}
        return args, kwargs

    def _after_plan(self, plan: Any) -> None:
        """Refuse context parallelism, record the plan, prepare activation checkpointing."""
        registry = self.registry
        if plan is not None:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                refuse_context_parallel()  # needs a process group
            watched = registry.calls.current.watched
            if watched is not None:
                watched.append(plan)
        if torch.is_grad_enabled() and activation_checkpointing.NAME in vars(
            registry.blocks.layers[0]
        ):
            activation_checkpointing.keep_plans(registry)


class Forget:
    """Forward hook of the model, run even if the forward fails: clears the call's options."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self.registry = registry

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.registry.calls.current.options = None
        _leave(self.registry)


class ForgetPlan:
    """Forward hook of the stack: notes the edits on the cache, and clears the plan."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self.registry = registry

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self.registry.calls.current
        if call.plan is not None and output is not None and not torch.compiler.is_compiling():
            note_edits(call.plan, output)
        call.plan = None
        if call.options is None:
            _leave(self.registry)


def _enter(registry: AdapterRegistry) -> None:
    """Register this thread's forward.

    Raises:
        RuntimeError: modules that the active adapter trains are out of the model.
    """
    if torch.compiler.is_compiling():
        return
    with registry.lock:
        if registry.heads.paths.get(str(registry.active)):
            registry.check_modules_present()
        registry.active_threads.threads.add(threading.get_ident())


def _leave(registry: AdapterRegistry) -> None:
    if not torch.compiler.is_compiling():
        registry.active_threads.threads.discard(threading.get_ident())


def extended_signature(base_model: nn.Module) -> inspect.Signature:
    """The base model's signature with this library's keywords."""
    signature = inspect.signature(base_model.forward)
    parameters = list(signature.parameters.values())
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in OPTIONS
        if name not in signature.parameters
    ]
    rest = len(parameters)
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        rest -= 1
    return signature.replace(parameters=[*parameters[:rest], *extra, *parameters[rest:]])
