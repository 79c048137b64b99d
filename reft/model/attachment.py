"""What is attached to a base model, as its submodule ``reft``: adapters, and the state of a
forward.

It is a submodule of the ``PreTrainedModel`` itself, so that the engines which shard a model by its
modules own the parameters too, in the unit of the root.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reft.model.heads import HeadStore
from reft.model.plan import ForwardPlan, Member, Prompt, find_prompt, member_rows
from reft.model.sites import Sites
from reft.nn.bank import Bank

#: Name of the attachment among the base model's submodules.
SUBMODULE = "reft"

#: The adapter name that means "no adapter", PEFT's.
BASE = "__base__"


@dataclass(eq=False)
class Generation:
    """The prompt of a generate() in progress.

    Attributes:
        prompt: one entry a sequence, before beams.
        width: columns of the padded prompt.
        adapter_names: one a sequence, or None for the active adapter.
        thread: whose forwards these are.
        seen: columns that went through, as far as the host counts them.
    """

    prompt: Prompt
    width: int
    adapter_names: Sequence[str] | None
    thread: int
    seen: int = 0

    def names(self, batch: int) -> Sequence[str] | None:
        """Adapter names of ``batch`` sequences, repeated as the prompts are."""
        if self.adapter_names is None or len(self.adapter_names) == batch:
            return self.adapter_names
        times = batch // max(len(self.adapter_names), 1)
        return [name for name in self.adapter_names for _ in range(times)]


class Attachment(nn.Module):
    """Adapters of one base model and what its hooks share.

    Attributes:
        adapters: name -> its bank.
        heads: modules of the base that adapters train in full.
        sites: the blocks of the base.
        causal: whether labels are next tokens, so that the first one ends the prompt.
        handles: block number -> the hook on it.
        active: the adapter that forwards use, or None.
        in_place: write edits into the blocks' outputs. False where something that saved a block's
            output for backward says that it was modified.
        current: the plan of the forward in progress.
    """

    def __init__(self, sites: Sites, causal: bool) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.heads = HeadStore()
        self.sites, self.causal = sites, causal
        self.handles: dict[int, RemovableHandle] = {}
        self.active: str | None = None
        self.in_place = True
        self.disabled = 0
        self.current: ForwardPlan | None = None
        self.generation: Generation | None = None

    def bank(self, name: str) -> Bank:
        """The bank of an adapter.

        Raises:
            ValueError: there is no adapter of that name.
        """
        if name not in self.adapters:
            known = ", ".join(repr(one) for one in self.adapters) or "none"
            raise ValueError(f"adapter_name must be one of the adapters ({known}), got {name!r}")
        bank = self.adapters[name]
        assert isinstance(bank, Bank)
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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "current": None, "generation": None}

    # ---------------------------------------------------------------- generation

    @contextmanager
    def generating(self, generation: Generation) -> Iterator[None]:
        """Remember a prompt while its continuation is generated.

        Raises:
            RuntimeError: another thread generates with this model.
        """
        before = self.generation
        if before is not None and before.thread != generation.thread:
            raise RuntimeError(
                "this model is generating in another thread; give each thread its own copy, or one "
                "batch with adapter_names"
            )
        self.generation = generation
        try:
            yield
        finally:
            self.generation = before

    def _generation(self) -> Generation | None:
        now = self.generation
        if now is None or torch.compiler.is_compiling():
            return now
        return now if now.thread == threading.get_ident() else None

    # ---------------------------------------------------------------- the plan of a forward

    def plan_forward(
        self,
        model: nn.Module,
        call: dict[str, Any],
        prompt_lengths: Tensor | Sequence[int] | None,
        adapter_names: Sequence[str] | None,
    ) -> ForwardPlan | None:
        """The plan of a forward of ``model`` with arguments ``call``, or None if nothing is edited.

        Without gradients, a forward that lies behind every prompt, as in decoding, has none. While
        gradients are recorded there is one even if every row is −1: in data-parallel training every
        rank must reach every parameter.
        """
        tokens = call.get("inputs_embeds")
        if tokens is None:
            tokens = call.get("input_ids")
        if self.disabled or (self.active is None and adapter_names is None):
            return None
        if not isinstance(tokens, Tensor) or tokens.ndim < 2:
            raise ValueError(
                f"{type(model).__name__} must be called with input_ids or inputs_embeds of (batch, "
                "columns, …) while an adapter is active: positions are counted in them"
            )
        if call.get("cu_seq_lens_q") is not None:
            raise ValueError(
                "sequences that are packed into one row (cu_seq_lens_q) cannot be edited yet: "
                "positions are counted in padded batches"
            )
        batch, window = tokens.shape[:2]
        generation = self._generation()
        if generation is not None and prompt_lengths is None:
            if adapter_names is None:
                adapter_names = generation.names(batch)
            start, done = _progress(generation, call, window)
        else:
            generation = None
            known = _known_length(_past_length(call), window)
            start = 0 if known is None else known
            # What follows a cache is not the prompt, unless the caller says how long that is.
            done = prompt_lengths is None and not (isinstance(known, int) and known == 0)
        chosen = [
            (self.bank(name), sequences)
            for name, sequences in self._chosen(adapter_names, batch, tokens.device)
        ]
        if done:
            if generation is None and self.causal and call.get("labels") is not None:
                raise ValueError(
                    "prompt_lengths must be given with labels and a filled cache: the labels do "
                    "not tell how much of the prompt the cache holds"
                )
            chosen = [pair for pair in chosen if pair[0].config.positions == "all"]
        if not chosen:
            return None
        if generation is not None:
            prompt = generation.prompt.expand(batch)
        else:
            prompt = self._find_prompt(call, tokens, start, prompt_lengths)
        members = [
            Member(
                bank,
                member_rows(
                    bank.config, prompt, window_start=start, window=window, sequences=sequences
                ),
                bank.config.dropout if bank.training else 0.0,
            )
            for bank, sequences in chosen
        ]
        return ForwardPlan(members, (batch, window))

    def _find_prompt(
        self,
        call: dict[str, Any],
        tokens: Tensor,
        start: int | Tensor,
        prompt_lengths: Tensor | Sequence[int] | None,
    ) -> Prompt:
        """The prompt that a plain forward's own arguments tell."""
        batch, window = tokens.shape[:2]
        first = isinstance(start, int) and start == 0
        labels = call.get("labels") if self.causal and prompt_lengths is None and first else None
        return find_prompt(
            batch,
            start + window if isinstance(start, int) else window,
            tokens.device,
            attention_mask=call.get("attention_mask"),
            labels=labels,
            prompt_lengths=prompt_lengths,
        )

    def _chosen(
        self, adapter_names: Sequence[str] | None, batch: int, device: torch.device
    ) -> list[tuple[str, Tensor | None]]:
        """Adapters in the batch, each with the numbers of its sequences, None for all of them."""
        if adapter_names is None:
            assert self.active is not None
            return [(self.active, None)]
        if isinstance(adapter_names, str) or len(adapter_names) != batch:
            raise ValueError(
                "adapter_names must be a list of one name a sequence "
                f"({batch} of them), got {adapter_names!r}"
            )
        sequences: dict[str, list[int]] = {}
        for index, name in enumerate(adapter_names):
            if name != BASE:
                self.bank(name)
                sequences.setdefault(name, []).append(index)
        self.heads.check_mixed({*sequences, *({BASE} & set(adapter_names))}, self.active)
        if len(sequences) == 1 and BASE not in adapter_names:
            return [(name, None) for name in sequences]
        return [(name, torch.tensor(numbers, device=device)) for name, numbers in sequences.items()]


def _progress(
    generation: Generation, call: dict[str, Any], window: int
) -> tuple[int | Tensor, bool]:
    """First column of this forward of a generate(), and whether it lies behind the prompt.

    A cache that keeps its length on the device, or none at all, is not asked: the host counts.
    """
    past = _past_length(call)
    behind = past if isinstance(past, int) else generation.seen
    done = behind >= generation.width
    if not done:
        generation.seen = behind + window
    return (behind if past is None else past), done


def _past_length(call: dict[str, Any]) -> int | Tensor | None:
    """Columns in the cache before this forward: a number, a tensor where the cache keeps it so, or
    None where the cache, that of a state-space model, does not know."""
    cache: Any = call.get("past_key_values")
    if cache is None:
        cache = call.get("cache_params")
    if hasattr(cache, "get_seq_length"):
        try:
            return cache.get_seq_length()
        except ValueError:
            return None
    if isinstance(cache, (tuple, list)) and cache and isinstance(cache[0], (tuple, list)):
        return int(cache[0][0].shape[-2])
    return 0 if cache is None else None


def _known_length(past: int | Tensor | None, window: int) -> int | Tensor | None:
    """The length of a cache outside generate(), in a hand-written loop.

    One on the device is read from there. While compiling it cannot be, and some caches do not know
    theirs: a forward of one column is then taken for what it nearly always is, a step of decoding.
    """
    if isinstance(past, int):
        return past
    if isinstance(past, Tensor) and not torch.compiler.is_compiling():
        return int(past)
    if window == 1:
        return past
    raise ValueError(
        "this cache does not tell how much it holds (it is static and compiled, or of a "
        "state-space model), so a forward of several columns may be the prompt or not; use "
        "ReftModel.generate"
    )
