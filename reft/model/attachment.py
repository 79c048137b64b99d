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

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reft.config import ReftConfig
from reft.model.calls import Call, Calls, Options, Running
from reft.model.chosen import BASE, Chosen, choose, names_of, one_name, sources_by_name
from reft.model.generation import (
    Generation,
    behind_prompts,
    expanded,
    known_length,
    past_length,
    resolve_given,
)
from reft.model.heads import HeadStore
from reft.model.mixed import make_plan
from reft.model.plan import ForwardPlan, member_rows
from reft.model.prompt import Prompt, find_packed_prompt, find_prompt, packed_starts
from reft.model.sites import Sites
from reft.model.steps import Engine, plan_step
from reft.nn.bank import Bank
from reft.nn.spread import SpreadBank
from reft.serving.pool import AdapterPool
from reft.serving.tables import Lock, Site

#: Name of the attachment among the base model's submodules.
SUBMODULE = "reft"

#: Arguments that say that a cache of pages is used, as continuous batching does.
PAGED = ("write_index", "read_index", "block_table")


class Attachment(nn.Module):
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

    def __init__(self, sites: Sites, causal: bool, image_token: int | None = None) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.heads = HeadStore()
        self.sites, self.causal, self.image_token = sites, causal, image_token
        self.handles: dict[Site, RemovableHandle] = {}
        self.active: str | None = None
        self.unnamed_labels: list[str] | None = None
        self.in_place = True
        self.disabled = 0
        self.calls, self.running, self.lock = Calls(), Running(), Lock()
        self.engine_refs: list[weakref.ref[Engine]] = []

    @property
    def call(self) -> Call:
        """The forward that this thread is in."""
        return self.calls.mine

    def bank(self, name: str) -> Bank | SpreadBank:
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
        bank = self.adapters[name]
        assert isinstance(bank, (Bank, SpreadBank))
        return bank

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
        """:meth:`HeadStore.show`.

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

    # ---------------------------------------------------------------- the plan of a forward

    def plan_forward(self, stack: nn.Module, call: dict[str, Any]) -> ForwardPlan | None:
        """The plan of a forward of ``stack`` with arguments ``call``, or None if nothing is edited.

        Without gradients, a forward that lies behind every prompt, as in decoding, has none. While
        gradients are recorded there is one even if every row is −1: in data-parallel training every
        rank must reach every parameter.
        """
        if any(call.get(name) is not None for name in PAGED):
            return self._plan_step(call)
        if self.engine_refs and any(engine.busy() for engine in self.engines()):
            raise RuntimeError(
                "a continuous batching manager runs this model in another thread; add a request to "
                "it, stop it, or call the model inside its pause()"
            )
        options = self.call.options or Options()
        generation = self.call.generation
        if generation is not None and options.prompt_lengths is not None:
            generation = None
        names = options.adapter_names
        if self.call.disabled:
            return None
        ids = call.get("input_ids")
        tokens = call.get("inputs_embeds") if ids is None else ids
        parts, scales = options.subspaces, options.adapter_scales
        if generation is not None and isinstance(tokens, Tensor):
            batch = tokens.shape[0]
            names = generation.repeated(names or generation.adapter_names, batch)
            parts = generation.repeated(parts or generation.subspaces, batch)
            if scales is None:
                scales = generation.adapter_scales
            scales = generation.repeated(scales, batch)
        active = self.active
        if generation is not None and generation.active is not None:
            active = generation.active
        if active is None and names is None:
            return None
        if not isinstance(tokens, Tensor) or tokens.ndim < 2:
            raise ValueError(
                f"{type(stack).__name__} must be called with input_ids or inputs_embeds of (batch, "
                "columns, …) while an adapter is active: positions are counted in them"
            )
        batch, window = shape = (tokens.shape[0], tokens.shape[1])
        starts = None
        if generation is None:
            past = past_length(call)
            starts = packed_starts(call, shape) if isinstance(past, int) and not past else None
        sequences = batch if starts is None else starts.shape[0]
        if names is None:
            assert active is not None
            names = [active] * sequences  # whatever becomes active meanwhile
        settled = generation if options.adapter_names is None else None
        sources = None if settled is None else settled.sources
        if sources is None:
            sources = sources_by_name(self, names_of(self, names, sequences))
        if starts is None and behind_prompts(call, options, generation, sources.values()):
            return None
        chosen = choose(self, names, scales, parts, sequences, sources)
        start: int | Tensor = 0
        if starts is None:
            start, chosen = self._in_this_window(chosen, call, options, generation, window)
        if not chosen:
            return None
        if generation is not None:
            prompt, given = generation.prompt.expand(batch), expanded(generation.given, batch)
            images = generation.ids
        else:
            prompt = self._find_prompt(call, tokens, starts, start, options)
            mask, images = call.get("attention_mask"), ids
            columns = shape if not isinstance(start, int) else (batch, start + window)
            given = resolve_given(options.edit_positions, ids, mask, prompt, columns)
        width = window if starts is None else batch * window

        def rows_of(config: ReftConfig, mine: Tensor | None) -> tuple[Tensor, ...]:
            columns = given
            if config.positions == "image":
                columns = expanded(self._images(images), batch)
            if config.positions == "given" and given is None:
                raise ValueError(
                    'edit_positions must be given: the adapter has positions "given", which every '
                    "call has to name"
                )
            return member_rows(
                config, prompt, window_start=start, window=width, sequences=mine, chosen=columns
            )

        return make_plan(
            self, chosen, rows_of, shape,
            sequences=sequences, device=tokens.device, packed=starts is not None,
        )  # fmt: skip

    def _plan_step(self, call: dict[str, Any]) -> ForwardPlan | None:
        """The plan of a step of continuous batching.

        Raises:
            ValueError: nobody tells which requests the step computes.
        """
        tokens = call.get("input_ids")
        for engine in self.engines():
            parts = engine.parts(call.get("cache"))
            if parts is not None and isinstance(tokens, Tensor):
                return plan_step(self.pool.tables, parts, tokens.shape[1], tokens.device)
        if self.disabled or self.active is None:
            return None
        raise ValueError(
            "continuous batching mixes the prompts and the generated tokens of many requests, and "
            "the base model's manager does not tell which is whose; use ReftModel.generate_batch, "
            "or ReftModel.init_continuous_batching"
        )

    def _in_this_window(
        self,
        chosen: list[Chosen],
        call: dict[str, Any],
        options: Options,
        generation: Generation | None,
        window: int,
    ) -> tuple[int | Tensor, list[Chosen]]:
        """(first column of this forward, the adapters that may edit anything in it)."""
        generated = [one.config.parsed_positions.generated for one in chosen]
        if generation is not None:
            start, beyond = generation.progress(call, window, max(generated, default=0))
        else:
            known = known_length(past_length(call), window)
            start = 0 if known is None else known
            # What follows a cache is not the prompt, unless the caller says how long that is.
            said = options.prompt_lengths is not None or options.edit_positions is not None
            at_start = said or (isinstance(known, int) and not known)
            beyond = -1 if at_start else 0
            if not at_start and any(generated):
                raise ValueError(
                    "prompt_lengths must be given with a filled cache: the cache does not tell how "
                    'many tokens of it were generated, which positions "prompt+g…" count'
                )
            if not at_start and self.causal and options.labels is not None:
                raise ValueError(
                    "prompt_lengths must be given with labels and a filled cache: the labels do "
                    "not tell how much of the prompt the cache holds"
                )
        left = [
            one
            for one, more in zip(chosen, generated, strict=True)
            if beyond < more or one.config.positions == "all"
        ]
        return start, left

    def _find_prompt(
        self,
        call: dict[str, Any],
        tokens: Tensor,
        starts: Tensor | None,
        start: int | Tensor,
        options: Options,
    ) -> Prompt:
        """The prompt that a plain forward's own arguments tell."""
        batch, window = tokens.shape[:2]
        lengths = options.prompt_lengths
        first = isinstance(start, int) and start == 0
        labels = options.labels if self.causal and lengths is None and first else None
        if starts is not None:
            starts = starts.to(tokens.device)
            return find_packed_prompt(starts, batch * window, labels=labels, prompt_lengths=lengths)
        return find_prompt(
            batch,
            start + window if isinstance(start, int) else window,
            tokens.device,
            attention_mask=call.get("attention_mask"),
            labels=labels,
            prompt_lengths=lengths,
            shifted=self.sites.side == "decoder",
        )

    def _images(self, ids: Tensor | None) -> Tensor:
        if ids is None:
            raise ValueError('positions "image" are told by input_ids, got inputs_embeds alone')
        assert self.image_token is not None  # checked when the adapter was added
        return ids == self.image_token
