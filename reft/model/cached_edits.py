"""What the columns of a cache were edited with, and how much of a filled cache a generation may
use: the keys and values of a token depend on every edit before it.

A prompt that begins with a cached one has its last tokens elsewhere. So each forward that edits
notes on its cache which columns it edited, and ``generate`` goes on from the first column at which
the cache and the new prompt differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reft.model.batch import choose
from reft.model.forward_plan import ForwardPlan
from reft.model.generation import Generation, past_length
from reft.model.planner import edited_by, generation_rows
from reft.model.prompts import cache_of

if TYPE_CHECKING:
    from reft.model.registry import AdapterRegistry

#: The attribute of a cache that holds its notes; copies of the cache have copies of them.
ATTRIBUTE = "_reft_edits"


@dataclass(frozen=True, eq=False)
class Note:
    """The edits of one forward.

    Attributes:
        adapters: what tells whether another forward edits with the same ones.
        start: its first column.
        shape: (B, S) of its window.
        rows: int64 vectors of rows of the flattened window, −1 for none.
    """

    adapters: tuple[object, ...]
    start: int | Tensor
    shape: tuple[int, int]
    rows: tuple[Tensor, ...]


def note_edits(plan: ForwardPlan, output: Any) -> None:
    """Note on the cache of a forward what it edited.

    Args:
        plan: of the forward.
        output: of the stack of blocks, which holds a cache that was made in the forward.
    """
    cache = plan.cache
    if cache is None and isinstance(output, dict):
        # By what it can do: to ask an output for the cache's earlier name is a deprecation warning.
        cache = next((part for part in output.values() if hasattr(part, "get_seq_length")), None)
    if not hasattr(cache, "crop"):
        return
    rows = {id(edit.rows): edit.rows.rows for edits in plan.edits.values() for edit in edits}
    # A cache that keeps its length on the device counts on in the same tensor.
    start = plan.start.clone() if isinstance(plan.start, Tensor) else plan.start
    note = Note(plan.adapters, start, plan.shape, tuple(rows.values()))
    if not hasattr(cache, ATTRIBUTE):
        setattr(cache, ATTRIBUTE, [])
    getattr(cache, ATTRIBUTE).append(note)


def reuse_cache(registry: AdapterRegistry, generation: Generation, kwargs: dict[str, Any]) -> None:
    """Shorten the filled cache that a ``generate`` was given to the columns that hold what reading
    its whole prompt would have put there.

    Raises:
        ValueError: it must be shortened, and cannot be, or the tokens to read again were not given.
    """
    cache: Any = cache_of({name: kwargs.get(name) for name in ("cache", "past_key_values")})
    if generation.restarts or not hasattr(cache, "get_seq_length"):
        return
    past = int(past_length({"cache": cache}) or 0)
    if not past:
        return
    batch = generation.prompt.length.shape[0]
    usable = _agreeing(registry, generation, getattr(cache, ATTRIBUTE, []), batch, past)
    if usable == past:
        return
    wrong = (
        f"this cache of {past} columns was edited otherwise than this prompt asks for, from column "
        f"{usable} on"
    )
    if generation.ids is not None and generation.ids.shape[1] != generation.width:
        raise ValueError(f"{wrong}: give all tokens of the prompt, so that they can be read again")
    if not all(map(_is_croppable, _layers(cache))):
        raise ValueError(
            f"{wrong}, and this {type(cache).__name__} cannot be shortened; generate without it"
        )
    cache.crop(usable - past)  # a negative number takes columns away in every release
    notes = [note for note in getattr(cache, ATTRIBUTE, []) if int(note.start) < usable]
    setattr(cache, ATTRIBUTE, notes)


def _layers(cache: Any) -> list[Any]:
    inner = getattr(cache, "self_attention_cache", cache)  # of an encoder–decoder
    return list(getattr(inner, "layers", ()))


def _is_croppable(layer: Any) -> bool:
    """Whether a layer of a cache can be shortened: one with a sliding window only as long as the
    window is not full."""
    window = getattr(layer, "sliding_window", None)
    if window is not None and int(layer.get_seq_length()) < window:
        return True
    return window is None and bool(getattr(layer, "is_croppable", hasattr(layer, "crop")))


def _agreeing(
    registry: AdapterRegistry, generation: Generation, notes: list[Note], batch: int, past: int
) -> int:
    """The number of columns, of ``past``, up to which the cache is edited as the prompt asks."""
    chosen = []
    active = generation.active
    if not registry.call.disabled and (generation.adapter_names is not None or active is not None):
        chosen = choose(
            registry, generation.adapter_names, generation.adapter_scales, generation.subspaces,
            batch, generation.sources or {}, active,
        )  # fmt: skip
    device = generation.prompt.length.device
    wanted = torch.zeros(batch, past, dtype=torch.bool, device=device)
    rows_of = generation_rows(registry, generation, batch, 0, past)
    for one in chosen:
        mine = None if one.sequences is None else torch.tensor(one.sequences, device=device)
        for rows in rows_of(one.config, mine):
            _mark(wanted, rows)
    made = torch.zeros_like(wanted)
    adapters = edited_by(chosen)
    foreign = torch.zeros_like(wanted)
    for note in notes:
        start, (sequences, columns) = int(note.start), note.shape
        end = min(start + columns, past)
        other = note.adapters != adapters or batch % sequences != 0
        window = torch.zeros(note.shape, dtype=torch.bool, device=device)
        for rows in note.rows:
            _mark(window, rows.to(device))
        if other:
            window = window.any(dim=0, keepdim=True).expand(batch, -1)
        else:
            window = window.repeat_interleave(batch // sequences, dim=0)
        # A later forward overwrites what was cut off before it.
        made[:, start:] = foreign[:, start:] = False
        if start < end:
            (foreign if other else made)[:, start:end] = window[:, : end - start]
    differing = ((wanted != made) | foreign).any(dim=0)
    return int(differing.int().argmax()) if bool(differing.any()) else past


def _mark(marked: Tensor, rows: Tensor) -> None:
    """Set the entries of a contiguous bool tensor that rows name."""
    flat = torch.cat([marked.reshape(-1), marked.new_zeros(1)])  # −1 is the last
    flat[rows] = True
    marked.copy_(flat[:-1].view_as(marked))
