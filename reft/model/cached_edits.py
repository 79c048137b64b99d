"""Reuse of a filled cache in ``generate``: the keys and values of a token depend on every edit
before it.

A prompt that begins with a cached prompt has its last tokens elsewhere. So each forward that edits
notes the edited columns on its cache, and ``generate`` keeps the cache up to the first column that
the new prompt would edit differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reft.model.batch import BatchAdapter, batch_adapters
from reft.model.forward_inputs import cache_of, past_length
from reft.model.forward_plan import ForwardPlan
from reft.model.generation import Generation
from reft.model.planner import edit_identity, generation_rows
from reft.model.prompts import ColumnRange
from reft.model.registry import AdapterRegistry

#: The attribute of a cache that holds its notes. Copies of the cache have copies of the notes.
ATTRIBUTE = "_reft_edits"


@dataclass(frozen=True, eq=False)
class Note:
    """The edits of one forward.

    Attributes:
        identity: equal for two forwards that edit with the same adapters in the same way.
        start: the forward's first column.
        shape: (B, S) of its columns.
        rows: int64 vectors of rows of the flattened columns, −1 for none.
    """

    identity: tuple[object, ...]
    start: int | Tensor
    shape: tuple[int, int]
    rows: tuple[Tensor, ...]


def note_edits(plan: ForwardPlan, output: Any) -> None:
    """Note the edits of a forward on its cache.

    Args:
        plan: of the forward.
        output: of the stack of blocks; it has the cache if the forward made it.
    """
    cache = plan.cache
    if cache is None and isinstance(output, dict):
        # Recognised by its methods: the cache's former keyword raises a deprecation warning.
        cache = next((value for value in output.values() if hasattr(value, "get_seq_length")), None)
    if not hasattr(cache, "crop"):
        return
    rows = {id(edit.rows): edit.rows.rows for edits in plan.edits.values() for edit in edits}
    # A cache that keeps its length on the device updates the same tensor later.
    start = plan.start.clone() if isinstance(plan.start, Tensor) else plan.start
    note = Note(plan.identity, start, plan.shape, tuple(rows.values()))
    if not hasattr(cache, ATTRIBUTE):
        setattr(cache, ATTRIBUTE, [])
    getattr(cache, ATTRIBUTE).append(note)


def reuse_cache(registry: AdapterRegistry, generation: Generation, kwargs: dict[str, Any]) -> None:
    """Shorten the filled cache of a ``generate`` to the columns that its prompt edits alike.

    Raises:
        ValueError: the cache cannot be shortened, or the tokens to read again were not given.
    """
    cache: Any = cache_of({name: kwargs.get(name) for name in ("cache", "past_key_values")})
    if generation.restarts or not hasattr(cache, "get_seq_length"):
        return
    past = int(past_length(cache) or 0)
    if not past:
        return
    batch = generation.prompt.length.shape[0]
    usable = _agreeing(registry, generation, getattr(cache, ATTRIBUTE, []), batch, past)
    if usable == past:
        return
    wrong = f"from column {usable} on, this cache of {past} columns was edited for another prompt"
    if generation.ids is not None and generation.ids.shape[1] != generation.width:
        raise ValueError(f"{wrong}: give all tokens of the prompt, so that they can be read again")
    if not all(map(_is_croppable, _layers(cache))):
        raise ValueError(
            f"{wrong}, and this {type(cache).__name__} cannot be shortened; generate without it"
        )
    cache.crop(usable - past)  # every release crops by a negative number
    notes = [note for note in getattr(cache, ATTRIBUTE, []) if int(note.start) < usable]
    setattr(cache, ATTRIBUTE, notes)


def _layers(cache: Any) -> list[Any]:
    inner = getattr(cache, "self_attention_cache", cache)  # of an encoder–decoder
    return list(getattr(inner, "layers", ()))


def _is_croppable(layer: Any) -> bool:
    """Whether a layer of a cache can be shortened. One with a sliding window can, until the window
    is full."""
    window = getattr(layer, "sliding_window", None)
    if window is not None and int(layer.get_seq_length()) < window:
        return True
    return window is None and bool(getattr(layer, "is_croppable", hasattr(layer, "crop")))


def _agreeing(
    registry: AdapterRegistry, generation: Generation, notes: list[Note], batch: int, past: int
) -> int:
    """The number of columns, at most ``past``, up to which the cache is edited as for this
    generation."""
    adapters: list[BatchAdapter] = []
    active = generation.active
    if not registry.call.disabled and (generation.adapter_names is not None or active is not None):
        adapters = batch_adapters(
            generation.adapter_names, generation.adapter_scales, generation.subspaces,
            batch, generation.sources or {}, active,
        )  # fmt: skip
    device = generation.prompt.length.device
    wanted = torch.zeros(batch, past, dtype=torch.bool, device=device)
    finder = generation_rows(registry, generation, batch, ColumnRange(0, past), adapters)
    for adapter in adapters:
        listed = adapter.sequences
        sequences = None if listed is None else torch.tensor(listed, device=device)
        for rows in finder.rows(adapter.source, sequences):
            _mark(wanted, rows)
    made = torch.zeros_like(wanted)
    identity = edit_identity(adapters)
    foreign = torch.zeros_like(wanted)
    for note in notes:
        start, (noted_batch, columns) = int(note.start), note.shape
        end = min(start + columns, past)
        other = note.identity != identity or batch % noted_batch != 0
        window = torch.zeros(note.shape, dtype=torch.bool, device=device)
        for noted in note.rows:
            _mark(window, noted.to(device))
        if other:
            window = window.any(dim=0, keepdim=True).expand(batch, -1)
        else:
            window = window.repeat_interleave(batch // noted_batch, dim=0)
        # A later forward overwrites columns that were cropped before it.
        made[:, start:] = foreign[:, start:] = False
        if start < end:
            (foreign if other else made)[:, start:end] = window[:, : end - start]
    differing = ((wanted != made) | foreign).any(dim=0)
    return int(differing.int().argmax()) if bool(differing.any()) else past


def _mark(marked: Tensor, rows: Tensor) -> None:
    """Set the entries of a contiguous bool tensor at some rows, −1 for none."""
    flat = torch.cat([marked.reshape(-1), marked.new_zeros(1)])  # −1 is the last entry
    flat[rows] = True
    marked.copy_(flat[:-1].view_as(marked))
