"""What is attached to a base model, as its submodule ``reft``: adapters, and the state of a
forward.

It is a submodule of the ``PreTrainedModel`` itself, so that the engines which shard a model by its
modules own the parameters too, in the unit of the root.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn
from torch.utils.hooks import RemovableHandle

from reft.adapter.device_cache import EditSite
from reft.adapter.locks import Lock
from reft.adapter.multi_device import MultiDeviceParameters
from reft.adapter.parameters import AdapterParameters
from reft.adapter.pool import AdapterPool
from reft.model.batch import BASE, one_name
from reft.model.blocks import ModelBlocks
from reft.model.call_state import Call, Calls, Running
from reft.model.forward_plan import ForwardPlan
from reft.model.generation import Generation
from reft.model.modules_to_save import ModulesToSave
from reft.model.step_plan import Engine

#: Name of the attachment among the base model's submodules.
SUBMODULE = "reft"


class AdapterRegistry(nn.Module):
    """Adapters of one base model and what its hooks share.

    Attributes:
        adapters: name -> its bank.
        heads: modules of the base that adapters train in full.
        pool: adapters that are served and never trained.
        sites: the blocks of the base.
        causal: whether labels are next tokens, so that the first one ends the prompt.
        image_token: the id that stands for a piece of an image, or None.
        handles: block number and component -> the hook on it.
        active: the adapter that forwards use, or None.
        ends: adapter -> tokens that it was trained to end with and the base does not stop at.
        unnamed_labels: what the base called its classes, where an adapter has named them.
        in_place: write edits into the blocks' outputs. False where something that saved a block's
            output for backward says that it was modified.
        disabled: how often all threads together have switched adapters off.
        calls: the forward that each thread is in.
        running: the threads that are in one.
        lock: held while adapters come, go or change places.
        engine_refs: managers of continuous batching, as long as somebody holds them.
    """

    pool: AdapterPool

    def __init__(self, sites: ModelBlocks, causal: bool, image_token: int | None = None) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.heads = ModulesToSave()
        self.sites, self.causal, self.image_token = sites, causal, image_token
        self.handles: dict[EditSite, RemovableHandle] = {}
        self.active: str | None = None
        self.unnamed_labels: list[str] | None = None
        self.ends: dict[str, tuple[int, ...]] = {}
        self.in_place = True
        self.disabled = 0
        self.calls, self.running, self.lock = Calls(), Running(), Lock()
        self.engine_refs: list[weakref.ref[Engine]] = []

    @property
    def call(self) -> Call:
        """The forward that this thread is in."""
        return self.calls.mine

    def adapter(self, name: str) -> AdapterParameters | MultiDeviceParameters:
        """The bank of an adapter.

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
            known = ", ".join(repr(one) for one in self.adapters) or "none"
            more = f" or of the pool's {len(self.pool)}" if len(self.pool) else ""
            raise ValueError(
                f"adapter_name must be one of the adapters ({known}){more}, got {name!r}"
            )
        adapter = self.adapters[name]
        assert isinstance(adapter, (AdapterParameters, MultiDeviceParameters))
        return adapter

    def check_new_name(self, name: str) -> None:
        """Refuse a name that an adapter cannot get.

        Raises:
            ValueError: it is empty, taken, reserved, or holds a dot or a slash.
        """
        allowed = "a new name without dots or slashes"
        if not isinstance(name, str) or not name or "." in name or "/" in name:
            raise ValueError(f"adapter_name must be {allowed}, got {name!r}")
        if name == BASE or hasattr(self.adapters, name):
            taken = "taken" if name in self.adapters else "reserved"
            raise ValueError(f"adapter_name must be {allowed}, got {name!r}, which is {taken}")
        if name in self.pool:
            raise ValueError(f"adapter_name must be {allowed}, got {name!r}, which is in the pool")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "engine_refs": [], "disabled": 0}

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "nn.DataParallel cannot copy a model with adapters: its hooks edit with the parameters "
            "of the first device; start one process a device (torchrun, accelerate launch)"
        )

    def engines(self) -> list[Engine]:
        """The managers of continuous batching that there are."""
        found = [engine for ref in self.engine_refs if (engine := ref()) is not None]
        if len(found) < len(self.engine_refs):
            self.engine_refs = [weakref.ref(engine) for engine in found]
        return found

    @contextmanager
    def running_again(self, plan: ForwardPlan | None) -> Iterator[None]:
        """Inside, a part of the forward of ``plan`` is run once more."""
        call = self.call
        before = call.current, call.restored
        call.current, call.restored = plan, True
        try:
            yield
        finally:
            call.current, call.restored = before

    # ---------------------------------------------------------------- generation

    @contextmanager
    def generating(self, generation: Generation) -> Iterator[None]:
        """Remember a prompt while this thread generates its continuation."""
        call = self.call
        before, call.generation = call.generation, generation
        self.running.generations.append(generation)
        try:
            yield
        finally:
            call.generation = before
            self.running.generations.remove(generation)

    # ---------------------------------------------------------------- several threads

    def enter(self) -> None:
        """This thread begins a forward.

        Raises:
            RuntimeError: modules that the active adapter trains are out of the model.
        """
        with self.lock:
            name, heads = self.active, self.heads
            away = name is not None and heads.shown != name and heads.paths.get(name)
            if away and not self.call.disabled:
                raise RuntimeError(
                    f"adapter {name!r} trains whole modules, which disable_adapter() in another "
                    "thread has taken out of the model; wait until it is left, or give each "
                    "thread a model of its own (in a copy made inside it: set_adapter)"
                )
            self.running.threads.add(threading.get_ident())

    def show_heads(self, base: nn.Module, name: str | None) -> None:
        """:meth:`ModulesToSave.show`.

        Raises:
            RuntimeError: it would change the model under a forward of another thread.
        """
        heads = self.heads
        with self.lock:
            exchanged = set() if name == heads.shown else {name or "", heads.shown or ""}
            if any(heads.paths.get(one) for one in exchanged):
                self.running.check("exchanging the modules that an adapter trains")
            heads.show(base, name)

    @contextmanager
    def disabling(self, base: nn.Module) -> Iterator[None]:
        """Inside, forwards of this thread are the base's."""
        mine = self.call  # it may be left in another thread, as of a generator
        with self.lock:
            self.show_heads(base, None)
            self.disabled += 1
            mine.disabled += 1
        try:
            yield
        finally:
            with self.lock:
                self.disabled -= 1
                mine.disabled -= 1
                if not self.disabled:
                    self.show_heads(base, self.active)
