"""transformers' continuous batching with one adapter for each request.

The manager is a subclass of transformers' own. It depends on these internals of transformers, and
no other module does:

* read: ``input_queue`` of the manager; ``cache`` and ``has_pending_requests()`` of its
  ``batch_processor``; ``active_requests`` and ``waiting_requests`` of the scheduler; of each entry
  of ``inputs_and_outputs.requests_in_batch``, the ``query_length``, ``state.request_id`` and
  ``state.position_offset``; of a model, :data:`CACHED_MANAGER`;
* overridden: ``manager._create_batch_processor``, and the two methods of the paged cache that look
  up and register shared blocks.
"""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from reft.adapter.requests import Chunk, Request, TokenKeys

#: The cache's method that looks up shared blocks: (request id, tokens) to the number of tokens in
#: existing blocks.
SEARCH = "search_prefix_match"

#: The cache's method that registers blocks for sharing: (state of a request, number of complete
#: blocks). The name depends on the release.
REGISTER = ("mark_complete_blocks", "mark_shareable_blocks_as_complete")

#: The attribute of a model that holds its persistent manager.
CACHED_MANAGER = "_cached_continuous_batching_manager"


class Host(Protocol):
    """The model's adapters, as a manager needs them."""

    def settle(
        self, lengths: Sequence[int], names: Sequence[str] | None, scales: Any
    ) -> list[Request]:
        """Determine the edits of requests of these lengths. Raises ValueError, RuntimeError."""

    def starts(self, manager: AdapterManager) -> None:
        """Raise RuntimeError if another manager of the model runs."""

    def stopped(self) -> None:
        """Clean up after the last request."""


class AdapterManager(ContinuousBatchingManager):
    """A continuous batching manager whose requests name adapters, made by
    ``ReftModel.init_continuous_batching``.

    A request keeps the adapter that its name meant when it was added, even if the adapter is
    trained, replaced or removed meanwhile. While requests run, forwards of the model in other
    threads are refused.
    """

    _host: Host
    _keys: TokenKeys
    _requests: dict[str, Request]  # by id, until they are finished
    _begun: dict[str, Request]  # the requests that were in a step
    _reserved: list[Request] | None  # determined in advance for the next add_requests
    _collected: list[tuple[Any, ...]] | None
    _adding: threading.RLock
    _names: Iterator[str]
    _modes: Mapping[nn.Module, bool]
    _pauses: int

    @classmethod
    def from_manager(
        cls,
        manager: ContinuousBatchingManager,
        host: Host,
        vocabulary: int,
        modes: Mapping[nn.Module, bool],
    ) -> AdapterManager:
        """Convert a manager of transformers that was not started yet.

        Args:
            manager: is changed and returned.
            host: the model's adapters.
            vocabulary: larger than any token id.
            modes: module to its training mode, to be restored when the manager stops.
        """
        if isinstance(manager, cls):  # persistent, from an earlier call
            manager._modes = modes
            return manager
        manager.__class__ = cls
        assert isinstance(manager, cls)
        manager._host, manager._keys, manager._modes = host, TokenKeys(vocabulary), modes
        manager._requests, manager._begun = {}, {}
        manager._adding = threading.RLock()
        manager._names = map("request_{}".format, itertools.count())
        manager._reserved = manager._collected = None
        manager._pauses = 0
        return manager

    # ---------------------------------------------------------------- requests

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        *args: Any,
        adapter_name: str | None = None,
        adapter_scale: float | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Add a request, as transformers' method.

        Args:
            adapter_name: an adapter of the model or of its pool, "__base__" for none; None for the
                active one.
            adapter_scale: multiplies its edit.

        Returns:
            The request's id; None if the manager takes no more requests.

        Raises:
            ValueError: an unknown adapter, positions that do not follow from a prompt's length, an
                invalid scale, an id in use. Nothing was added.
            RuntimeError: the adapters were detached from the model.
        """
        with self._adding:
            if self._collected is not None:
                self._collected.append((input_ids, request_id, args, kwargs))
                return request_id
            names = None if adapter_name is None else [adapter_name]
            [request] = self._host.settle([len(input_ids)], names, adapter_scale)
            return self._add(request, input_ids, request_id, args, kwargs)

    def add_requests(
        self,
        inputs: Sequence[Sequence[int]],
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        adapter_scales: Any = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add requests, as transformers' method.

        Args:
            adapter_names: one for each request; None for the active adapter.
            adapter_scales: multiply the edits, one number or one for each request.

        Raises:
            ValueError: as :meth:`add_request`, or a wrong number of names or scales. Nothing was
                added.
            RuntimeError: the adapters were detached from the model.
        """
        with self._adding:
            requests, self._reserved = self._reserved, None
            if requests is None:
                lengths = [len(tokens) for tokens in inputs]
                requests = self._host.settle(lengths, adapter_names, adapter_scales)
            # transformers may add them in another order, but returns ids in the order of inputs.
            self._collected = []
            try:
                ids = super().add_requests(inputs, *args, **kwargs)  # type: ignore[arg-type]
                collected = self._collected
            finally:
                self._collected = None
            by_id = dict(zip(ids, requests, strict=True))
            for tokens, request_id, positional, keywords in collected:
                self._add(by_id[request_id], tokens, request_id, positional, keywords)
            return ids

    def reserve(self, requests: list[Request]) -> None:
        """Set the edits of the requests of the next :meth:`add_requests`."""
        self._reserved = requests

    def _add(
        self,
        request: Request,
        tokens: Sequence[int],
        request_id: str | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> str | None:
        if request_id is None:
            request_id = next(self._names)
        begun = request_id in self._begun
        if request_id in self._requests and not (begun and not self._pending(request_id)):
            raise ValueError(f"request_id must be new, got {request_id!r}, which is in progress")
        children = (f"{request_id}__child#{i}" for i in range(self.num_return_sequences - 1))
        ids = (request_id, *children)
        self._requests.update(dict.fromkeys(ids, request))
        added = super().add_request(tokens, request_id, *args, **kwargs)  # type: ignore[arg-type]
        if added is None:
            for added_id in ids:
                self._requests.pop(added_id, None)
        return added

    def requests(self) -> list[Request]:
        """Return the requests that are not finished."""
        return list(self._requests.values())

    def _pending(self, request_id: str) -> bool:
        """Whether a request that was in a step is not finished."""
        processor = self.batch_processor
        if processor is None:
            return False
        scheduler = processor.scheduler
        return request_id in scheduler.active_requests or request_id in scheduler.waiting_requests

    # ---------------------------------------------------------------- steps

    def chunks(self, cache: object) -> list[Chunk] | None:
        """Return the chunks that the forward with this cache computes; None if the cache is not
        this manager's.

        Raises:
            RuntimeError: a request that was not added through this manager.
        """
        processor = self.batch_processor
        if processor is None or cache is None or processor.cache is not cache:
            return None
        batch: Any = processor.inputs_and_outputs
        chunks, in_step = [], {}
        for future in batch.requests_in_batch:
            request_id, stop = future.state.request_id, future.state.position_offset
            if request_id not in self._requests:
                raise RuntimeError(f"request {request_id!r} came without its adapter")
            request = in_step[request_id] = self._requests[request_id]
            chunks.append(Chunk(request, stop - future.query_length, stop))
        for request_id in self._begun.keys() - in_step.keys():
            if not self._pending(request_id):
                finished = self._begun.pop(request_id)
                if self._requests.get(request_id) is finished:
                    del self._requests[request_id]
        self._begun.update(in_step)
        return chunks

    def busy(self) -> bool:
        """Whether a forward in this thread would run beside one of the manager's."""
        if not self.is_running() or self._pauses:
            return False
        new: dict[str, Request] = {}
        for _ in range(20):
            processor = self.batch_processor
            if not self.input_queue.empty():
                return True
            if processor is not None and processor.has_pending_requests():
                return True
            requests = list(self._requests.items())
            new = {name: request for name, request in requests if name not in self._begun}
            if not new:
                return False
            time.sleep(0.005)  # the loop has taken them and not listed them yet
        self._begun.update(new)  # refused by the loop or cancelled: the next step drops them
        return False

    # ---------------------------------------------------------------- the loop

    def start(self) -> None:
        """Start the loop, as transformers' method.

        Raises:
            RuntimeError: another manager of this model runs.
        """
        try:
            self._host.starts(self)
        except RuntimeError:
            self._reserved = None
            raise
        super().start()

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """Stop the loop, as transformers' method, and restore the training mode of modules."""
        super().stop(*args, **kwargs)
        if self.is_running():  # the caller does not wait
            return
        self._requests.clear()
        self._begun.clear()
        for module, mode in self._modes.items():
            module.training = mode
        self._host.stopped()

    if hasattr(ContinuousBatchingManager, "pause"):

        @contextmanager
        def pause(self) -> Iterator[None]:
            """Pause the loop, as transformers' method. Meanwhile the model may be called."""
            with super().pause():
                self._pauses += 1
                try:
                    yield
                finally:
                    self._pauses -= 1

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        if SEARCH not in vars(processor.cache):
            share_by_edits(processor.cache, self._requests, self._keys)
        return processor


# -------------------------------------------------------------------- shared blocks


def share_by_edits(
    cache: PagedAttentionCache, requests: Mapping[str, Request], keys: TokenKeys
) -> None:
    """Let requests share a block only if its tokens and all edits up to its end are equal.

    transformers compares tokens alone, and would reuse one adapter's keys and values for another.
    """
    name = register_name()
    if name is None:
        return
    search, register = getattr(cache, SEARCH), getattr(cache, name)

    def search_keyed(request_id: str, prompt_ids: list[int]) -> int:
        ids = keys.replace_edited(requests[request_id], prompt_ids)
        return 0 if ids is None else search(request_id, ids)

    def register_keyed(state: Any, complete: Any) -> None:
        if not complete:
            return
        ids = keys.replace_edited(
            requests[state.request_id], state.initial_tokens + state.generated_tokens
        )
        if ids is not None:
            register(_Keyed(state, ids), complete)

    cache.__dict__.update({SEARCH: search_keyed, name: register_keyed})


class _Keyed:
    """The state of a request with other token ids."""

    def __init__(self, state: Any, ids: list[int]) -> None:
        self._state, self.initial_tokens = state, ids
        self.generated_tokens: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def register_name() -> str | None:
    """Return the name of the cache's method that registers blocks; None if this release has
    neither."""
    if not hasattr(PagedAttentionCache, SEARCH):
        return None
    return next((name for name in REGISTER if hasattr(PagedAttentionCache, name)), None)


# -------------------------------------------------------------------- settings


def checked_config(
    model: Any, generation_config: GenerationConfig, config: ContinuousBatchingConfig | None
) -> ContinuousBatchingConfig:
    """Return the settings of a manager, completed so that edits are exact.

    Args:
        model: the base.
        generation_config: may hold the settings if ``config`` is None.
        config: the settings; None for transformers' defaults.

    Raises:
        ValueError: the base has a persistent manager of its own; or CUDA graphs, asynchronous
            batching or a compiled forward. The host determines the edited rows of each step, and
            these features run steps without it.
    """
    cached = getattr(model, CACHED_MANAGER, None)
    if cached is not None and not isinstance(cached, AdapterManager):
        raise ValueError(
            "the base model keeps a continuous batching manager of its own; call "
            "destroy_cached_continuous_batching_manager() first"
        )
    if config is None:
        config = getattr(generation_config, "continuous_batching_config", None)
    config = ContinuousBatchingConfig() if config is None else copy.copy(config)
    compiled = (config.varlen_compile_config, config.decode_compile_config)
    sources = (generation_config, model.config.get_text_config())
    fallback = any(getattr(source, "compile_config", None) is not None for source in sources)
    for field, is_set in (
        ("use_cuda_graph", any(config.cuda_graph_booleans)),
        ("use_async_batching", bool(config.use_async_batching)),
        ("varlen_compile_config", compiled[0] is not None),
        ("decode_compile_config", compiled[1] is not None),
        ("default_compile_level", config.default_compile_level > 0),
        ("compile_config", fallback),
    ):
        if is_set:
            raise ValueError(
                f"{field} must be left unset: the host determines the edited rows of each step, "
                "and CUDA graphs, asynchronous batching and compiled forwards run steps without it"
            )
    config.use_cuda_graph = config.use_async_batching = False
    if register_name() is None:
        config.allow_block_sharing = False
    return config
