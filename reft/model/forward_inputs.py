"""The inputs of one forward, read once: its tokens, its cache, its options and the ``generate``
that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reft.adapter.sources import AdapterSource
from reft.model.call_state import ForwardOptions
from reft.model.generation import Generation
from reft.model.registry import AdapterRegistry

#: Keywords of caches that are not transformers' own.
_CACHE_KEYWORDS = ("past_key_values", "cache_params")


@dataclass(frozen=True, eq=False)
class ForwardInputs:
    """The inputs of a forward of the stack of blocks, with the options of the model's call.

    Attributes:
        tokens: ids (B, S) or embeddings (B, S, D).
        batch, seq_len: B and S.
        ids: the token ids; None where embeddings were given.
        attention_mask: as given.
        cache: the cache, or None.
        past: columns in the cache: an integer; a tensor where the cache keeps its length on the
            device; None where the cache does not know.
        packed_starts: int64 (sequences,), where the sequences of a packed batch start in the
            flattened batch; None for a padded batch.
        sequences: B, or the number of packed sequences.
        options: the call's options; in a generation also those of ``generate``, with one entry per
            sequence of this forward.
        generation: the ``generate`` in progress, or None.
        active: the adapter of the whole batch where no names are given.
        sources: the adapters that ``generate`` looked up when it started; None otherwise.
    """

    tokens: Tensor
    batch: int
    seq_len: int
    ids: Tensor | None
    attention_mask: Tensor | None
    cache: Any
    past: int | Tensor | None
    packed_starts: Tensor | None
    sequences: int
    options: ForwardOptions
    generation: Generation | None
    active: str | None
    sources: Mapping[str, AdapterSource] | None

    @property
    def tells_prompt(self) -> bool:
        """Whether the call says which tokens are the prompt, or which to edit."""
        return self.options.prompt_lengths is not None or self.options.edit_positions is not None


def read_inputs(
    registry: AdapterRegistry, stack: nn.Module, arguments: Mapping[str, Any]
) -> ForwardInputs | None:
    """Read the inputs of a forward of ``stack``.

    Args:
        arguments: its arguments by name.

    Returns:
        None if adapters are disabled or none is active.

    Raises:
        RuntimeError: ``torch.jit.trace`` records the forward.
        ValueError: there are no tokens to count positions in.
    """
    state = registry.calls.current
    options, generation = state.options or ForwardOptions(), state.generation
    if generation is not None and options.prompt_lengths is not None:
        generation = None  # the call describes a prompt of its own
    if state.disabled:
        return None
    active, sources = registry.active, None
    if generation is not None:
        active = active if generation.active is None else generation.active
        sources = generation.sources if options.adapter_names is None else None
        options = _with_generation(options, generation)
    if active is None and options.adapter_names is None:
        return None
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        raise RuntimeError(
            "torch.jit.trace cannot record the edits of a ReftModel: use torch.export.export or "
            "torch.compile, or trace the base inside disable_adapter()"
        )
    ids = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if ids is None else ids
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        raise ValueError(
            f"{type(stack).__name__} must get input_ids or inputs_embeds of (batch, columns, …) "
            "while an adapter is active: positions are counted in them"
        )
    batch, seq_len = tokens.shape[0], tokens.shape[1]
    mask, cache = arguments.get("attention_mask"), cache_of(arguments)
    past, starts = past_length(cache), None
    if generation is not None:
        generation.begin_prompt(past, tokens, mask)
        options = _repeated(options, generation, batch)
    elif isinstance(past, int) and not past:
        starts = packed_starts(arguments, cache, (batch, seq_len))
    return ForwardInputs(
        tokens, batch, seq_len, ids, mask, cache, past, starts,
        batch if starts is None else starts.shape[0],
        options, generation, active, sources,
    )  # fmt: skip


def _with_generation(options: ForwardOptions, generation: Generation) -> ForwardOptions:
    """The options of a forward, with those of ``generate`` where the forward has none."""
    scales = options.adapter_scales
    return replace(
        options,
        adapter_names=options.adapter_names or generation.adapter_names,
        adapter_scales=generation.adapter_scales if scales is None else scales,
        subspaces=options.subspaces or generation.subspaces,
    )


def _repeated(options: ForwardOptions, generation: Generation, batch: int) -> ForwardOptions:
    """The options with lists repeated for ``batch`` sequences, as beam search repeats prompts."""
    return replace(
        options,
        adapter_names=generation.repeated(options.adapter_names, batch),
        adapter_scales=generation.repeated(options.adapter_scales, batch),
        subspaces=generation.repeated(options.subspaces, batch),
    )


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among a forward's arguments, or None.

    A cache is recognised by its methods, whatever its keyword: transformers 5.24 renamed it.
    """
    for value in arguments.values():
        if hasattr(value, "get_seq_length"):
            return value
    for name in _CACHE_KEYWORDS:
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def past_length(cache: Any) -> int | Tensor | None:
    """The number of columns in a cache before this forward.

    Returns:
        An integer; a tensor where the cache keeps its length on the device; None where the cache
        does not know its length, as that of a state-space model.
    """
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        try:
            length: int | Tensor = cache.get_seq_length()
        except ValueError:
            return None
        return length
    if isinstance(cache, (tuple, list)) and cache and isinstance(cache[0], (tuple, list)):
        return int(cache[0][0].shape[-2])
    return None


def known_length(past: int | Tensor | None, seq_len: int) -> int | Tensor | None:
    """The length of a cache outside ``generate``, as in a hand-written decoding loop.

    A length on the device is read from there. A compiled forward cannot read it, and some caches
    do not know theirs: then a forward of one column is taken for a decoding step.

    Raises:
        ValueError: a forward of several columns on a cache of unknown length.
    """
    if isinstance(past, int):
        return past
    if isinstance(past, Tensor) and not torch.compiler.is_compiling():
        return int(past)
    if seq_len == 1:
        return past
    raise ValueError(
        "the length of this cache is unknown (it is static and compiled, or of a state-space "
        "model), so a forward of several columns may be the prompt or not; use "
        "ReftModel.generate"
    )


def packed_starts(
    arguments: Mapping[str, Any], cache: Any, shape: tuple[int, int]
) -> Tensor | None:
    """Find the starts of the sequences of a packed batch.

    ``cu_seq_lens_q`` says so. Otherwise a batch is packed, as transformers decides, if it has
    neither an attention mask nor a cache and its ``position_ids`` jump. The number of sequences is
    then read from the device; ``cu_seq_lens_q`` avoids that.

    Returns:
        int64 (sequences,) into the flattened batch; None for a padded batch.

    Raises:
        ValueError: a compiled forward got ``position_ids`` without ``cu_seq_lens_q``.
    """
    bounds: Tensor | None = arguments.get("cu_seq_lens_q")
    if bounds is not None:
        return bounds[:-1].long()
    position = arguments.get("position_ids")
    if not isinstance(position, Tensor) or tuple(position.shape) != shape:
        return None
    if arguments.get("attention_mask") is not None or cache is not None:
        return None
    if torch.compiler.is_compiling():
        raise ValueError(
            "position_ids do not tell a compiled forward how many sequences are packed in a row: "
            "give cu_seq_lens_q too, or an attention_mask if there is one sequence in each row"
        )
    jump = torch.ones_like(position, dtype=torch.bool)
    jump[:, 1:] = position.diff(dim=1) != 1
    starts = jump.reshape(-1).nonzero().reshape(-1)
    return starts if starts.shape[0] != shape[0] else None


def one_entry_per_text(options: ForwardOptions, choices: int) -> ForwardOptions:
    """The options of a model that chooses among several texts, with one entry per text.

    The model gets (batch, choices, tokens), and its stack of blocks one row per text.

    Args:
        options: ``adapter_names``, and lists of ``adapter_scales`` and ``subspaces``, have one
            entry per example, which holds for all its texts; ``prompt_lengths`` is
            (batch, choices) and ``edit_positions`` (batch, choices, …).
        choices: texts of each example.
    """

    def repeated(values: Any) -> Any:
        if not isinstance(values, (list, tuple)):
            return values
        return [value for value in values for _ in range(choices)]

    return replace(
        options,
        adapter_names=repeated(options.adapter_names),
        adapter_scales=repeated(options.adapter_scales),
        subspaces=repeated(options.subspaces),
        prompt_lengths=_flattened(options.prompt_lengths),
        edit_positions=_flattened(options.edit_positions),
    )


def _flattened(values: Any) -> Any:
    """Values (batch, choices, …) as (batch · choices, …)."""
    if isinstance(values, Tensor):
        return values.flatten(0, 1)
    if isinstance(values, Sequence) and not isinstance(values, str):
        return [value for example in values for value in example]
    return values
