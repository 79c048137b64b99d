"""transformers' continuous batching of a model with adapters: one adapter a request."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reft.adapter.device_cache import CacheItem
from reft.adapter.host_adapter import HostAdapter
from reft.adapter.requests import UNEDITED, Request, make_request
from reft.model.adapters import place_hooks
from reft.model.batch import BASE, names_of, scales_of, sites_of, sources_by_name
from reft.model.registry import SUBMODULE, AdapterRegistry

if TYPE_CHECKING:
    from reft.model.continuous_manager import AdapterManager


class ContinuousBatching:
    """The methods of :class:`reft.ReftModel` for transformers' continuous batching."""

    if TYPE_CHECKING:

        @property
        def _registry(self) -> AdapterRegistry: ...

        def get_base_model(self) -> nn.Module: ...

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: Any = None,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        adapter_scales: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The base model's ``generate_batch``: continuous batching of many prompts, each with its
        own adapter. Edits happen while prompts are read, in whatever chunks; decoding costs nothing
        unless positions are "all" or "prompt+g…".

        Requests share blocks of the cache where tokens and edits are the same.

        Args:
            inputs: token ids of each prompt, not padded.
            generation_config: what it leaves open, such as the tokens that end an answer, is the
                base's, as in ``generate``. It and the rest are transformers' own.
            adapter_names: one a prompt, "__base__" for none; None for the active adapter. What the
                names stand for is settled now, whatever is replaced meanwhile. Any number of
                adapters will do; more in one step than ``pool.capacity`` cost time.
            adapter_scales: what edits are multiplied by, one number or one a prompt.

        Returns:
            transformers' ``GenerationOutput`` by request id, in the order of the inputs.

        Raises:
            TypeError: the model cannot generate.
            ValueError: an unknown adapter, one whose positions a prompt's length does not tell,
                names or scales that are not one a prompt; CUDA graphs, asynchronous batching or a
                compiled forward. Nothing was computed.
            RuntimeError: another manager of this model runs.
        """
        own = _method(self, "generate_batch")
        lengths = [len(one) for one in inputs]
        requests = EngineHost(self._registry, self.get_base_model()).settle(
            lengths, adapter_names, adapter_scales
        )
        found: dict[str, Any] = own(
            _Call(self, requests), inputs, generation_config, *args, **kwargs
        )
        return found

    def init_continuous_batching(
        self,
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> AdapterManager:
        """The base model's ``init_continuous_batching``: a manager to which requests are added at
        any time, ``add_request(input_ids, adapter_name=…, streaming=True)``. What
        ``generation_config`` leaves open, such as the tokens that end an answer, is the base's, as
        in ``generate``.

        Raises:
            TypeError: the model cannot generate.
            ValueError: CUDA graphs, asynchronous batching or a compiled forward; a model split by
                tensors; a manager that the base model kept.
        """
        from reft.model.continuous_manager import AdapterManager, checked_config

        own = _method(self, "init_continuous_batching")
        base: Any = self.get_base_model()
        if getattr(base, "tp_size", None) not in (None, 1):
            raise ValueError(
                "continuous batching with adapters needs the whole model in one process, got one "
                f"that is split by tensors over {base.tp_size}"
            )
        registry = self._registry
        # transformers leaves the model in eval mode.
        generation_config = _completed(generation_config, base.generation_config)
        config = checked_config(base, generation_config, continuous_batching_config)
        modes = {module: module.training for module in base.modules()}
        base.eval()
        try:
            made = own(base, generation_config, config, *args, **kwargs)
        except BaseException:
            for module, mode in modes.items():
                module.training = mode
            raise
        vocabulary = base.config.get_text_config().vocab_size
        manager = AdapterManager.from_manager(made, EngineHost(registry, base), vocabulary, modes)
        if all(one is not manager for one in registry.engines()):
            registry.engine_refs.append(weakref.ref(manager))
        return manager

    def continuous_batching_context_manager(
        self,
        *args: Any,
        **kwargs: Any,
    ) -> AbstractContextManager[AdapterManager]:
        """The base model's ``continuous_batching_context_manager``, with the manager of
        :meth:`init_continuous_batching`, started, and stopped at the end."""
        own: Callable[..., AbstractContextManager[AdapterManager]]
        own = _method(self, "continuous_batching_context_manager")
        return own(_Call(self, None), *args, **kwargs)


def _completed(given: Any, own: Any) -> Any:
    """A copy of the settings ``given``, into which transformers writes, with what they leave open
    from the model's ``own``: continuous batching would run without, past the end of an answer."""
    settings = copy.deepcopy(own if given is None else given)
    for name, value in own.to_dict().items():
        if value is not None and getattr(settings, name, None) is None:
            setattr(settings, name, copy.deepcopy(value))
    return settings


def _method(model: ContinuousBatching, name: str) -> Any:
    """transformers' own function, to be called with whatever stands for the model.

    Raises:
        TypeError: it has none.
    """
    base = model.get_base_model()
    if not hasattr(base, name):
        raise TypeError(f"{type(base).__name__} has no continuous batching")
    return getattr(type(base), name)


class _Call:
    """The model, as transformers' functions see it in one call: they make and use the manager of
    the :class:`reft.ReftModel`."""

    def __init__(self, model: ContinuousBatching, requests: list[Request] | None) -> None:
        self.model, self.requests = model, requests

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model.get_base_model(), name)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> AdapterManager:
        manager = self.model.init_continuous_batching(*args, **kwargs)
        if self.requests is not None:
            manager.reserve(self.requests)
        return manager

    def continuous_batching_context_manager(
        self, *args: Any, **kwargs: Any
    ) -> AbstractContextManager[AdapterManager]:
        own: Callable[..., AbstractContextManager[AdapterManager]]
        own = _method(self.model, "continuous_batching_context_manager")
        return own(self, *args, **kwargs)


class EngineHost:
    """What a manager asks of the model; see :class:`reft.model.continuous_manager.Host`."""

    def __init__(self, registry: AdapterRegistry, base: nn.Module) -> None:
        self.registry, self.base = registry, base

    @torch.no_grad()
    def settle(
        self, lengths: Sequence[int], names: Sequence[str] | None, scales: Any
    ) -> list[Request]:
        """What edits each request."""
        registry = self.registry
        if self.base._modules.get(SUBMODULE) is not registry:
            raise RuntimeError(
                "the adapters were detached from the model by unload(); call "
                "destroy_cached_continuous_batching_manager() of the base"
            )
        factors = scales_of(scales, len(lengths))
        if names is None:
            listed: Sequence[str] = [registry.active or BASE] * len(lengths)
        else:
            listed = names_of(registry, names, len(lengths))
        sources = sources_by_name(registry, listed)
        if names is not None:
            registry.heads.check_mixed(set(listed), registry.active)
        if registry.call.disabled:
            return [UNEDITED] * len(lengths)
        residents: dict[str, CacheItem] = {}
        for name, source in sources.items():
            sites = sites_of(source)
            if isinstance(source, HostAdapter):
                residents[name] = CacheItem((source.content_hash, None), source.weights, sites)
            else:
                residents[name] = registry.pool.cache.current_item(name, source(), sites)
        return [
            UNEDITED
            if name == BASE
            else make_request(sources[name].config, residents[name], factor, length, name)
            for name, factor, length in zip(listed, factors, lengths, strict=True)
        ]

    def starts(self, manager: AdapterManager) -> None:
        """Refuse a second manager."""
        if any(one is not manager and one.is_running() for one in self.registry.engines()):
            raise RuntimeError(
                "another continuous batching manager of this model is running; stop it first, or "
                "add the requests to it"
            )

    def stopped(self) -> None:
        """Take away hooks that only requests needed."""
        place_hooks(self.registry)
