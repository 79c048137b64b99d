"""The plan of a forward: which adapters edit, in which rows, with which weights.

Nothing is read from a device, so that a forward waits for none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reft.adapter.host_adapter import HostAdapter
from reft.adapter.parameters import AdapterParameters
from reft.adapter.sources import AdapterSource
from reft.model.batch import BatchAdapter, batch_adapters, names_of
from reft.model.edit_positions import resolve_edit_positions
from reft.model.edited_rows import RowFinder
from reft.model.forward_inputs import ForwardInputs, known_length
from reft.model.forward_plan import ForwardPlan
from reft.model.generation import Generation, expanded
from reft.model.grouped_edits import batch_edits
from reft.model.prompts import ColumnRange, PromptSpans, find_packed_prompt, find_prompt
from reft.model.registry import AdapterRegistry
from reft.model.step_plan import plan_engine_step

#: Arguments of a forward on a paged cache, as in continuous batching.
PAGED = ("write_index", "read_index", "block_table")


def plan_forward(registry: AdapterRegistry, inputs: ForwardInputs) -> ForwardPlan | None:
    """Plan the edits of a forward.

    Returns:
        None if nothing is edited: without gradients, a forward behind every prompt, such as a
        decoding step. While gradients are recorded there is a plan even if every row is −1: in
        data-parallel training every rank must reach every parameter.
    """
    sources = _sources(registry, inputs)
    if _lies_behind_prompts(inputs, sources.values()):
        return None
    selected = select_adapters(registry, inputs, sources)
    chunk, adapters = _in_chunk(registry, inputs, selected)
    if not adapters:
        return None
    finder = _row_finder(registry, inputs, chunk, adapters)
    plan = _build_plan(registry, inputs, adapters, finder)
    plan.start, plan.cache = chunk.start, inputs.cache
    return plan


def plan_paged_step(registry: AdapterRegistry, arguments: Mapping[str, Any]) -> ForwardPlan | None:
    """Plan a forward on a paged cache: a step of continuous batching.

    Raises:
        ValueError: an adapter is active and no engine tells which requests the step computes.
    """
    tokens = arguments.get("input_ids")
    for engine in registry.engines():
        chunks = engine.chunks(arguments.get("cache"))
        if chunks is not None and isinstance(tokens, Tensor):
            return plan_engine_step(registry.pool.cache, chunks, tokens.shape[1], tokens.device)
    if registry.disabled or registry.active is None:
        return None
    raise ValueError(
        "continuous batching mixes the prompts and the generated tokens of many requests, and "
        "the base model's manager does not tell which belongs to which; use "
        "ReftModel.generate_batch, or ReftModel.init_continuous_batching"
    )


# ---------------------------------------------------------------- which adapters


def _sources(registry: AdapterRegistry, inputs: ForwardInputs) -> Mapping[str, AdapterSource]:
    """The adapters by name that the forward may edit with."""
    if inputs.sources is not None:
        return inputs.sources
    names = inputs.options.adapter_names
    if names is not None:
        return registry.sources(names_of(names, inputs.sequences))
    active = str(inputs.active)
    return {active: registry.adapters[active]}  # type: ignore[dict-item]  # a ModuleDict


def select_adapters(
    registry: AdapterRegistry, inputs: ForwardInputs, sources: Mapping[str, AdapterSource]
) -> list[BatchAdapter]:
    """Select the adapters of the batch, with their sequences, directions and scales.

    Raises:
        ValueError: see :func:`reft.model.batch.batch_adapters`; or an adapter with
            ``modules_to_save`` shares the batch with another.
    """
    options, active = inputs.options, inputs.active
    names, scales, subspaces = options.adapter_names, options.adapter_scales, options.subspaces
    if names is None and scales is None and subspaces is None:
        assert active is not None
        return [BatchAdapter(active, sources[active])]
    adapters = batch_adapters(names, scales, subspaces, inputs.sequences, sources, active)
    if names is not None:
        registry.modules_to_save.check_mixed(set(names), registry.active)
    return adapters


def _lies_behind_prompts(inputs: ForwardInputs, sources: Collection[AdapterSource]) -> bool:
    """Whether a forward is a decoding step that certainly edits nothing; a cheap check."""
    past = inputs.past
    if not isinstance(past, int) or not past:
        return False
    positions = [source.positions for source in sources]
    if any(spec.kind == "all" for spec in positions):
        return False
    generated = max((spec.generated for spec in positions), default=0)
    if inputs.generation is not None:
        return past - inputs.generation.width >= generated
    return not generated and not inputs.tells_prompt and inputs.options.labels is None


def _in_chunk(
    registry: AdapterRegistry, inputs: ForwardInputs, adapters: Sequence[BatchAdapter]
) -> tuple[ColumnRange, Sequence[BatchAdapter]]:
    """The columns of this forward, and the adapters that may edit any of them."""
    if inputs.packed_starts is not None:
        return ColumnRange(0, inputs.batch * inputs.seq_len), adapters
    generated = [adapter.source.positions.generated for adapter in adapters]
    if inputs.generation is not None:
        start, behind = inputs.generation.progress(
            inputs.past, inputs.seq_len, max([0, *generated])
        )
    else:
        past = inputs.past
        known = past if isinstance(past, int) else known_length(past, inputs.seq_len)
        start = 0 if known is None else known
        # Tokens behind a cache are not the prompt, unless the call describes the prompt.
        in_prompt = (isinstance(known, int) and not known) or inputs.tells_prompt
        behind = -1 if in_prompt else 0
        if not in_prompt:
            _check_filled_cache(registry, inputs, any(generated))
    editing = [
        adapter
        for adapter, count in zip(adapters, generated, strict=True)
        if behind < count or adapter.source.positions.kind == "all"
    ]
    return ColumnRange(start, inputs.seq_len), editing


def _check_filled_cache(registry: AdapterRegistry, inputs: ForwardInputs, generated: bool) -> None:
    """Refuse a forward on a filled cache that needs the length of the prompt in it.

    Raises:
        ValueError: ``prompt_lengths`` is missing.
    """
    if generated:
        raise ValueError(
            "prompt_lengths must be given with a filled cache: the cache does not tell how "
            'many tokens of it were generated, which positions "prompt+g…" count'
        )
    if registry.causal and inputs.options.labels is not None:
        raise ValueError(
            "prompt_lengths must be given with labels and a filled cache: the labels do "
            "not tell how much of the prompt the cache holds"
        )


# ---------------------------------------------------------------- which rows


def _row_finder(
    registry: AdapterRegistry,
    inputs: ForwardInputs,
    chunk: ColumnRange,
    adapters: Sequence[BatchAdapter],
) -> RowFinder:
    """The spans of the prompts, and the columns that the call or the image tokens name."""
    if inputs.generation is not None:
        return generation_rows(registry, inputs.generation, inputs.batch, chunk, adapters)
    spans = _prompt_spans(registry, inputs, chunk)
    given = None
    if inputs.options.edit_positions is not None:
        padded = inputs.packed_starts is None and isinstance(chunk.start, int)
        columns = chunk.start + inputs.seq_len if padded else inputs.seq_len
        given = resolve_edit_positions(
            inputs.options.edit_positions, inputs.ids, inputs.attention_mask, spans,
            (inputs.batch, int(columns)),
        )  # fmt: skip
    images = _image_columns(registry, inputs.ids, inputs.batch, adapters)
    return RowFinder(spans, chunk, given, images)


def generation_rows(
    registry: AdapterRegistry,
    generation: Generation,
    batch: int,
    chunk: ColumnRange,
    adapters: Sequence[BatchAdapter],
) -> RowFinder:
    """The row finder of some columns of a generation.

    Args:
        batch: sequences of the forward, beams included.
    """
    return RowFinder(
        generation.prompt.expand(batch),
        chunk,
        expanded(generation.given, batch),
        _image_columns(registry, generation.ids, batch, adapters),
    )


def _prompt_spans(
    registry: AdapterRegistry, inputs: ForwardInputs, chunk: ColumnRange
) -> PromptSpans:
    """The prompts that a forward outside ``generate`` shows by its own arguments."""
    options, starts, device = inputs.options, inputs.packed_starts, inputs.tokens.device
    lengths = options.prompt_lengths
    whole = isinstance(chunk.start, int) and chunk.start == 0
    labels = options.labels if registry.causal and lengths is None and whole else None
    if starts is not None:
        return find_packed_prompt(
            starts.to(device), chunk.seq_len,
            attention_mask=inputs.attention_mask, labels=labels, prompt_lengths=lengths,
        )  # fmt: skip
    columns = inputs.seq_len
    return find_prompt(
        inputs.batch,
        chunk.start + columns if isinstance(chunk.start, int) else columns,
        device,
        attention_mask=inputs.attention_mask,
        labels=labels,
        prompt_lengths=lengths,
        shifted=registry.blocks.side == "decoder",
    )


def _image_columns(
    registry: AdapterRegistry,
    ids: Tensor | None,
    batch: int,
    adapters: Sequence[BatchAdapter],
) -> Tensor | None:
    """The columns of image tokens, bool (B, columns); None if no adapter edits them.

    Raises:
        ValueError: the call has embeddings instead of token ids.
    """
    if not any(adapter.source.positions.kind == "image" for adapter in adapters):
        return None
    if ids is None:
        raise ValueError('positions="image" needs input_ids, got inputs_embeds only')
    assert registry.image_token is not None  # checked when the adapter was added
    return expanded(ids == registry.image_token, batch)


# ---------------------------------------------------------------- with which weights


def _build_plan(
    registry: AdapterRegistry,
    inputs: ForwardInputs,
    adapters: Sequence[BatchAdapter],
    finder: RowFinder,
) -> ForwardPlan:
    """Build the plan: adapters that are trained, or alone, edit with their own parameters, the
    others with slots of the device cache.

    Raises:
        ValueError: an adapter of the pool in a compiled model, or beside one that is trained; more
            adapters than the pool holds at once. Nothing was changed.
    """
    device, shape = inputs.tokens.device, (inputs.batch, inputs.seq_len)
    in_cache: list[BatchAdapter] = []
    direct: list[BatchAdapter] = []
    for adapter in adapters:
        (in_cache if _belongs_in_cache(adapter, len(adapters)) else direct).append(adapter)
    if in_cache:
        _check_pooled(adapters)
    rows = []
    for adapter in direct:
        listed = adapter.sequences
        sequences = None if listed is None else torch.tensor(listed, device=device)
        rows.append(finder.rows(adapter.source, sequences))
    if not in_cache:
        plan = ForwardPlan(direct, rows, shape)
    else:
        cached = batch_edits(
            registry.pool, in_cache, finder,
            sequences=inputs.sequences, device=device, packed=inputs.packed_starts is not None,
        )  # fmt: skip
        plan = ForwardPlan(direct, rows, shape, cached)
    plan.identity = edit_identity(adapters)
    return plan


def edit_identity(adapters: Sequence[BatchAdapter]) -> tuple[object, ...]:
    """Equal for two forwards that edit with the same adapters in the same way."""
    return tuple(
        [
            (adapter.name, adapter.sequences, adapter.active_ranks, adapter.scale)
            for adapter in adapters
        ]
    )


def _belongs_in_cache(adapter: BatchAdapter, adapters: int) -> bool:
    """Whether an adapter's edits can come from the cache, and are faster from it."""
    source = adapter.source
    if isinstance(source, HostAdapter):
        return True
    if not isinstance(source, AdapterParameters) or torch.compiler.is_compiling():
        return False
    if source.training or adapter.active_ranks is not None or torch.is_grad_enabled():
        return False
    return adapters > 1 or adapter.scale != 1.0


def _check_pooled(adapters: Sequence[BatchAdapter]) -> None:
    """Refuse adapters of the pool where parameters are compiled or trained.

    Raises:
        ValueError: with the adapter's name.
    """
    pooled = [adapter for adapter in adapters if isinstance(adapter.source, HostAdapter)]
    if not pooled:
        return
    name = pooled[0].name
    if torch.compiler.is_compiling():
        raise ValueError(
            f"adapter {name!r} is in the pool, which a compiled model cannot use: load it "
            "with load_adapter before compiling, or do not compile"
        )
    trained = torch.is_grad_enabled() and [
        adapter.name
        for adapter in adapters
        if not isinstance(adapter.source, HostAdapter)
        and any(parameter.requires_grad for parameter in adapter.source.parameters())
    ]
    if trained:
        raise ValueError(
            f"adapter {name!r} is in the pool, which is for inference, and {trained[0]!r} "
            "is trained in the same batch: use torch.no_grad(), or load it with load_adapter"
        )
