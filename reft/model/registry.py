"""The adapters of one base model, as its submodule ``reft``, and the state that its hooks share.

It is a submodule of the ``PreTrainedModel``, so that engines which shard a model by its modules own
the adapters' parameters too, in the unit of the root.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from reft.adapter.device_cache import EditSite
from reft.adapter.locks import Lock
from reft.adapter.multi_device import MultiDeviceParameters
from reft.adapter.parameters import AdapterParameters
from reft.adapter.pool import AdapterPool
from reft.adapter.requests import BASE, Chunk, Request
from reft.adapter.sources import AdapterSource
from reft.model.batch import one_name
from reft.model.blocks import ModelBlocks
from reft.model.call_state import ActiveThreads, CallState, ThreadCallState
from reft.model.forward_plan import ForwardPlan
from reft.model.generation import Generation
from reft.model.modules_to_save import ModulesToSave

#: Name of the registry among the base model's submodules.
SUBMODULE = "reft"


class Engine(Protocol):
    """An engine that runs the model, as a forward sees it."""

    def chunks(self, cache: object) -> list[Chunk] | None:
        """The chunks that the forward with this cache computes; None if it is not the engine's."""

    def busy(self) -> bool:
        """Whether the engine runs the model in another thread."""

    def is_running(self) -> bool:
        """Whether the engine has been started and not stopped."""

    def requests(self) -> list[Request]:
        """The requests that are not finished."""


class AdapterRegistry(nn.Module):
    """The adapters of one base model by name, and what its hooks share.

    Attributes:
        adapters: name -> its parameters.
        heads: :attr:`modules_to_save`, under its name in state dicts.
        pool: adapters for inference.
        blocks: the blocks of the base.
        causal: labels are next tokens, so that the first one ends the prompt.
        image_token: token id of image patches, or None.
        handles: block number and component -> the hook on it.
        active: the adapter that forwards use, or None.
        ends: adapter -> tokens that it was trained to end with and that the base does not stop at.
        unnamed_labels: the base's names of its classes, where an adapter has replaced them.
        in_place: write edits into the blocks' outputs. Set it to False if an operation that saved a
            block's output for backward reports that it was modified.
        disabled: number of open ``disable_adapter`` contexts in all threads.
        calls: the state of each thread's forward.
        active_threads: the threads that run a forward.
        lock: held while adapters are added, removed or exchanged.
        engine_refs: managers of continuous batching, as long as they are referenced.
    """

    pool: AdapterPool

    def __init__(self, blocks: ModelBlocks, causal: bool, image_token: int | None = None) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.heads = ModulesToSave()
        self.blocks, self.causal, self.image_token = blocks, causal, image_token
        self.handles: dict[EditSite, RemovableHandle] = {}
        self.active: str | None = None
        self.unnamed_labels: list[str] | None = None
        self.ends: dict[str, tuple[int, ...]] = {}
        self.in_place = True
        self.disabled = 0
        self.calls, self.active_threads, self.lock = ThreadCallState(), ActiveThreads(), Lock()
        self.engine_refs: list[weakref.ref[Engine]] = []

    @property
    def call(self) -> CallState:
        """The state of the calling thread's forward."""
        return self.calls.current

    @property
    def modules_to_save(self) -> ModulesToSave:
        """Modules of the base that adapters train in full."""
        return self.heads

    # ---------------------------------------------------------------- adapters by name

    def adapter(self, name: str) -> AdapterParameters | MultiDeviceParameters:
        """The parameters of an adapter.

        Raises:
            ValueError: there is no adapter of that name.
        """
        name = one_name(name)
        if name not in self.adapters:
            if name in self.pool:
                raise ValueError(
                    f"adapter_name must be an adapter with parameters on the model; {name!r} is in "
                    "its pool: name it in adapter_names"
                )
            known = ", ".join(map(repr, self.adapters)) or "none"
            more = f" or of the pool's {len(self.pool)}" if len(self.pool) else ""
            raise ValueError(
                f"adapter_name must be one of the adapters ({known}){more}, got {name!r}"
            )
        adapter = self.adapters[name]
        assert isinstance(adapter, (AdapterParameters, MultiDeviceParameters))
        return adapter

    def sources(self, names: Sequence[str]) -> dict[str, AdapterSource]:
        """The adapters that names stand for, "__base__" left out.

        Raises:
            ValueError: there is no adapter of a name.
        """
        pooled = self.pool.adapters
        sources: dict[str, AdapterSource] = {}
        for name in dict.fromkeys(names):
            if name != BASE:
                adapter = pooled.get(name)  # read once: another thread may remove it
                sources[name] = self.adapter(name) if adapter is None else adapter
        return sources

    def check_new_name(self, name: str) -> None:
        """Check that a new adapter can have a name.

        Raises:
            ValueError: the name is empty, taken or reserved, or has a dot or a slash.
        """
        allowed = "a new name without dots or slashes"
        if not isinstance(name, str) or not name or "." in name or "/" in name:
            raise ValueError(f"adapter_name must be {allowed}, got {name!r}")
        if name == BASE or hasattr(self.adapters, name):
            taken = "taken" if name in self.adapters else "reserved"
            raise ValueError(f"adapter_name must be {allowed}, got {name!r}, which is {taken}")
        if name in self.pool:
            raise ValueError(f"adapter_name must be {allowed}, got {name!r}, which is in the pool")

    # ---------------------------------------------------------------- calls

    def engines(self) -> list[Engine]:
        """The managers of continuous batching that exist."""
        engines = [engine for ref in self.engine_refs if (engine := ref()) is not None]
        if len(engines) < len(self.engine_refs):
            self.engine_refs = [weakref.ref(engine) for engine in engines]
        return engines

    def check_engines(self) -> None:
        """Refuse a forward that would disturb a running engine.

        Raises:
            RuntimeError: a manager of continuous batching runs in another thread.
        """
        if any(engine.busy() for engine in self.engines()):
            raise RuntimeError(
                "a continuous batching manager runs this model in another thread; add a request "
                "to it, stop it, or call the model inside its pause()"
            )

    @contextmanager
    def restoring(self, plan: ForwardPlan | None) -> Iterator[None]:
        """Inside, a part of the forward of ``plan`` runs again."""
        call = self.call
        before = call.plan, call.restored
        call.plan, call.restored = plan, True
        try:
            yield
        finally:
            call.plan, call.restored = before

    @contextmanager
    def generating(self, generation: Generation) -> Iterator[None]:
        """Inside, the forwards of this thread belong to a generation."""
        call = self.call
        before, call.generation = call.generation, generation
        self.active_threads.generations.append(generation)
        try:
            yield
        finally:
            call.generation = before
            self.active_threads.generations.remove(generation)

    # ---------------------------------------------------------------- modules that adapters train

    def check_modules_present(self) -> None:
        """Check that the model has the modules that the active adapter trains in full.

        Raises:
            RuntimeError: another thread has disabled adapters.
        """
        name, modules = self.active, self.modules_to_save
        missing = name is not None and modules.active != name and modules.paths.get(name)
        if missing and not self.call.disabled:
            raise RuntimeError(
                f"adapter {name!r} trains whole modules, which disable_adapter() in another "
                "thread has taken out of the model; wait until it is left, or give each "
                "thread a model of its own (in a copy made inside it: set_adapter)"
            )

    def activate_modules(self, base: nn.Module, name: str | None) -> None:
        """Put the modules that an adapter trains into the base; None for the base's own.

        Raises:
            RuntimeError: another thread is in a forward, which the exchange would change.
        """
        modules = self.modules_to_save
        with self.lock:
            exchanged = set() if name == modules.active else {name or "", modules.active or ""}
            if any(modules.paths.get(adapter) for adapter in exchanged):
                self.active_threads.check_alone("exchanging the modules that an adapter trains")
            modules.activate(base, name)

    @contextmanager
    def disabling(self, base: nn.Module) -> Iterator[None]:
        """Inside, forwards of this thread are the base's."""
        call = self.call  # the context may be left in another thread, as that of a generator
        with self.lock:
            self.activate_modules(base, None)
            self.disabled += 1
            call.disabled += 1
        try:
            yield
        finally:
            with self.lock:
                self.disabled -= 1
                call.disabled -= 1
                if not self.disabled:
                    self.activate_modules(base, self.active)

    # ---------------------------------------------------------------- copies

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "engine_refs": [], "disabled": 0}

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "nn.DataParallel cannot copy a model with adapters: its hooks edit with the parameters "
            "of the first device; start one process per device (torchrun, accelerate launch)"
        )
