"""A ``generate`` in progress: its prompt, which chunks, beams and caches hide from later forwards,
its adapters, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from reft.adapter.sources import AdapterSource
from reft.model.prompts import PromptSpans, find_prompt


@dataclass(eq=False)
class Generation:
    """The state of a ``generate``.

    Attributes:
        prompt: the prompts' spans, before beams repeat them.
        width: columns of the padded prompt.
        adapter_names: one per sequence, or None for the active adapter.
        thread: identifier of the thread that generates.
        ids: int64 (B, width), the prompt's tokens; None where it was given as embeddings.
        given: the columns of ``edit_positions``; None without that argument.
        subspaces: one entry per sequence or one for all; None for the whole edit.
        adapter_scales: one per sequence or one for all; None for 1.
        sources: the adapters by name, looked up at the start: a later change of the pool or the
            model does not affect them.
        active: the adapter that was active at the start, where no names are given.
        restarts: the model's own ``generate`` runs several generations of prompts that it makes
            itself. Each begins with a forward on an empty cache.
        seen: columns computed so far, as counted on the host.
    """

    prompt: PromptSpans
    width: int
    adapter_names: Sequence[str] | None
    thread: int
    ids: Tensor | None = None
    given: Tensor | None = None
    subspaces: Any = None
    adapter_scales: Any = None
    sources: Mapping[str, AdapterSource] | None = None
    active: str | None = None
    restarts: bool = False
    seen: int = 0

    def begin_prompt(
        self, past: int | Tensor | None, tokens: Tensor, attention_mask: Tensor | None
    ) -> None:
        """Take the prompt from a forward on an empty cache, where the model makes the prompts
        itself.

        Args:
            past: columns in the cache.
            tokens: ids (B, S) or embeddings (B, S, D).
            attention_mask: as given to the forward.
        """
        if self.restarts and past == 0:
            batch, self.width = tokens.shape[:2]
            self.prompt = find_prompt(
                batch, self.width, tokens.device, attention_mask=attention_mask
            )
            self.ids = tokens if tokens.ndim == 2 else None
            self.seen = 0

    def check_alike(self) -> None:
        """Refuse options that differ between sequences, where sequences leave the batch.

        Raises:
            ValueError: adapters, scales or subspaces differ.
        """
        if not self.restarts:
            return
        for name in ("adapter_names", "adapter_scales", "subspaces"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)):
                continue
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"{name} must be the same for all sequences, got {values!r}: this model's "
                    "generate() lets sequences leave the batch and does not tell which; generate "
                    "for each adapter by itself"
                )

    def repeated(self, values: Any, batch: int) -> Any:
        """Repeat a list of one value per sequence as beam search repeats the prompts.

        Args:
            values: the list; anything else is returned unchanged.
            batch: sequences of this forward.
        """
        if not isinstance(values, (list, tuple)) or len(values) == batch:
            return values
        if self.restarts:
            return [*values[:1]] * batch  # check_alike: all values are the same
        times = batch // max(len(values), 1)
        return [value for value in values for _ in range(times)]

    def progress(
        self, past: int | Tensor | None, seq_len: int, generated: int
    ) -> tuple[int | Tensor, int]:
        """How far this forward lies behind the prompt.

        A cache that keeps its length on the device, or does not know it, is not read: the host
        counts columns until ``generated`` tokens are there.

        Args:
            past: columns in the cache.
            seq_len: columns of this forward.
            generated: generated tokens that some adapter edits.

        Returns:
            First column of this forward; generated tokens before it, negative while the prompt is
            read.
        """
        behind = past if isinstance(past, int) else self.seen
        if behind < self.width + generated:
            self.seen = behind + seq_len
        return (behind if past is None else past), behind - self.width


def expanded(columns: Tensor | None, batch: int) -> Tensor | None:
    """Repeat the prompts' columns, (B, …), for a batch that beam search has expanded."""
    if columns is None or columns.shape[0] in (0, batch):
        return columns
    return columns.repeat_interleave(batch // columns.shape[0], dim=0)
