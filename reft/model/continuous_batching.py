"""Continuous batching of transformers for a model with adapters: one adapter per request."""

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
from reft.adapter.requests import BASE, UNEDITED, Request, make_request
from reft.model.adapters import place_hooks
from reft.model.batch import names_of, scales_of
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
        own adapter.

        Prompts are edited during prefill, whatever the chunks. Decoding steps cost nothing extra
        unless positions are "all" or "prompt+g…". Requests share blocks of the KV cache if their
        tokens and edits are the same.

        Args:
            inputs: token ids of each prompt, without padding.
            generation_config: transformers' own, like all further arguments. Settings that it
                leaves open, such as the end tokens, are the base's, as in ``generate``.
            adapter_names: one name per prompt, "__base__" for no adapter; None for the active one.
                The adapters are read now: replacing them meanwhile changes nothing. Any number is
                allowed; more than ``pool.capacity`` in one step cost time.
            adapter_scales: factors of the edits, one number or one per prompt.

        Returns:
            transformers' ``GenerationOutput`` by request id, in the order of the inputs.

        Raises:
            TypeError: the model cannot generate.
            ValueError: an unknown adapter; an adapter whose positions do not follow from a prompt's
                length; not one name or scale per prompt; CUDA graphs, asynchronous batching or a
                compiled forward. Nothing was computed.
            RuntimeError: another manager of this model is running.
        """
        generate_batch = _method(self, "generate_batch")
        requests = EngineHost(self._registry, self.get_base_model()).settle(
            [len(prompt) for prompt in inputs], adapter_names, adapter_scales
        )
        outputs: dict[str, Any] = generate_batch(
            _ModelProxy(self, requests), inputs, generation_config, *args, **kwargs
        )
        return outputs

    def init_continuous_batching(
        self,
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> AdapterManager:
        """The base model's ``init_continuous_batching``: make a manager that takes requests at any
        time, ``add_request(input_ids, adapter_name=…, streaming=True)``.

        Settings that ``generation_config`` leaves open, such as the end tokens, are the base's, as
        in ``generate``.

        Raises:
            TypeError: the model cannot generate.
            ValueError: CUDA graphs, asynchronous batching or a compiled forward; a model under
                tensor parallelism; a manager that the base model has cached.
        """
        from reft.model.continuous_manager import AdapterManager, checked_config

        make_manager = _method(self, "init_continuous_batching")
        base: Any = self.get_base_model()
        if getattr(base, "tp_size", None) not in (None, 1):
            raise ValueError(
                "continuous batching with adapters needs the whole model in one process, got one "
                f"under tensor parallelism over {base.tp_size} processes"
            )
        registry = self._registry
        generation_config = _completed(generation_config, base.generation_config)
        config = checked_config(base, generation_config, continuous_batching_config)
        modes = {module: module.training for module in base.modules()}
        base.eval()  # transformers does it too, and does not undo it
        try:
            made = make_manager(base, generation_config, config, *args, **kwargs)
        except BaseException:
            for module, mode in modes.items():
                module.training = mode
            raise
        vocabulary = base.config.get_text_config().vocab_size
        manager = AdapterManager.from_manager(made, EngineHost(registry, base), vocabulary, modes)
        if all(engine is not manager for engine in registry.engines()):
            registry.engine_refs.append(weakref.ref(manager))
        return manager

    def continuous_batching_context_manager(
        self,
        *args: Any,
        **kwargs: Any,
    ) -> AbstractContextManager[AdapterManager]:
        """The base model's ``continuous_batching_context_manager``: the manager of
        :meth:`init_continuous_batching`, started, and stopped at the end."""
        return _ModelProxy(self, None).continuous_batching_context_manager(*args, **kwargs)


def _completed(given: Any, defaults: Any) -> Any:
    """A copy of generation settings, filled up from the model's ``defaults``.

    Continuous batching itself ignores the defaults and would generate past the end of an answer. It
    is a copy because transformers writes into the settings.
    """
    settings = copy.deepcopy(defaults if given is None else given)
    for name, value in defaults.to_dict().items():
        if value is not None and getattr(settings, name, None) is None:
            setattr(settings, name, copy.deepcopy(value))
    return settings


def _method(model: ContinuousBatching, name: str) -> Any:
    """A method of the base model's class, unbound, so that a proxy can be its ``self``.

    Raises:
        TypeError: the base model's class has no such method.
    """
    base = model.get_base_model()
    if not hasattr(base, name):
        raise TypeError(f"{type(base).__name__} has no continuous batching")
    return getattr(type(base), name)


class _ModelProxy:
    """A stand-in for the base model in transformers' methods, which makes them use the manager of
    the :class:`reft.ReftModel`.

    Args:
        model: the wrapped model.
        requests: requests that the manager reserves; None for none.
    """

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
        open_manager: Callable[..., AbstractContextManager[AdapterManager]]
        open_manager = _method(self.model, "continuous_batching_context_manager")
        return open_manager(self, *args, **kwargs)


class EngineHost:
    """The model's side of a manager; see :class:`reft.model.continuous_manager.Host`."""

    def __init__(self, registry: AdapterRegistry, base: nn.Module) -> None:
        self.registry, self.base = registry, base

    @torch.no_grad()
    def settle(
        self, lengths: Sequence[int], names: Sequence[str] | None, scales: Any
    ) -> list[Request]:
        """Find the adapter, scale and edited tokens of each request.

        Args:
            lengths: number of prompt tokens of each request.
            names: adapter name of each request; None for the active adapter.
            scales: one factor, one per request, or None.

        Raises:
            RuntimeError: the adapters were detached from the model.
            ValueError: see :meth:`ContinuousBatching.generate_batch`.
        """
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
            listed = names_of(names, len(lengths))
        sources = registry.sources(listed)
        if names is not None:
            registry.modules_to_save.check_mixed(set(listed), registry.active)
        if registry.call.disabled:
            return [UNEDITED] * len(lengths)
        items: dict[str, CacheItem] = {}
        for name, source in sources.items():
            if isinstance(source, HostAdapter):
                items[name] = CacheItem((source.content_hash, None), source.weights, source.sites)
            else:
                items[name] = registry.pool.cache.current_item(name, source(), source.sites)
        return [
            UNEDITED
            if name == BASE
            else make_request(sources[name].config, items[name], factor, length, name)
            for name, factor, length in zip(listed, factors, lengths, strict=True)
        ]

    def starts(self, manager: AdapterManager) -> None:
        """Refuse to start a manager while another one is running.

        Raises:
            RuntimeError: another manager of this model is running.
        """
        if any(engine is not manager and engine.is_running() for engine in self.registry.engines()):
            raise RuntimeError(
                "another continuous batching manager of this model is running; stop it first, or "
                "add the requests to it"
            )

    def stopped(self) -> None:
        """Remove hooks that only requests needed."""
        place_hooks(self.registry)
