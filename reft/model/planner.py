"""The plan of a forward: which adapters edit which sequences, and where.

Nothing is read from a device, so that a forward waits for none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reft.config import ReftConfig
from reft.model.batch import BatchAdapter, choose, names_of, sources_by_name
from reft.model.call_state import Options
from reft.model.forward_plan import ForwardPlan, member_rows
from reft.model.generation import (
    Generation,
    behind_prompts,
    expanded,
    known_length,
    past_length,
    resolve_given,
)
from reft.model.grouped_edits import RowsOf, make_plan
from reft.model.prompts import Prompt, cache_of, find_packed_prompt, find_prompt, packed_starts
from reft.model.step_plan import plan_engine_step

if TYPE_CHECKING:
    from reft.model.registry import AdapterRegistry

#: Arguments that say that a cache of pages is used, as continuous batching does.
PAGED = ("write_index", "read_index", "block_table")


def plan_forward(
    registry: AdapterRegistry, stack: nn.Module, call: dict[str, Any]
) -> ForwardPlan | None:
    """The plan of a forward of ``stack`` with arguments ``call``, or None if nothing is edited.

    Without gradients, a forward that lies behind every prompt, as in decoding, has none. While
    gradients are recorded there is one even if every row is −1: in data-parallel training every
    rank must reach every parameter.
    """
    if any(call.get(name) is not None for name in PAGED):
        return _plan_paged(registry, call)
    if registry.engine_refs and any(engine.busy() for engine in registry.engines()):
        raise RuntimeError(
            "a continuous batching manager runs this model in another thread; add a request to "
            "it, stop it, or call the model inside its pause()"
        )
    options = registry.call.options or Options()
    generation = registry.call.generation
    if generation is not None and options.prompt_lengths is not None:
        generation = None
    if registry.call.disabled:
        return None
    ids = call.get("input_ids")
    tokens = call.get("inputs_embeds") if ids is None else ids
    names, parts, scales = options.adapter_names, options.subspaces, options.adapter_scales
    active = registry.active
    if generation is not None:
        names = names or generation.adapter_names
        parts = parts or generation.subspaces
        scales = generation.adapter_scales if scales is None else scales
        active = active if generation.active is None else generation.active
    if active is None and names is None:
        return None
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        raise RuntimeError(
            "torch.jit.trace cannot record the edits of a ReftModel: use torch.export.export or "
            "torch.compile, or trace the base inside disable_adapter()"
        )
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
    else:
        generation.arrives(call, tokens)
        names, parts, scales = (generation.repeated(one, batch) for one in (names, parts, scales))
    sequences = batch if starts is None else starts.shape[0]
    settled = generation if options.adapter_names is None else None
    sources = None if settled is None else settled.sources
    if sources is None:
        sources = sources_by_name(
            registry, [str(active)] if names is None else names_of(registry, names, sequences)
        )
    if starts is None and behind_prompts(call, options, generation, sources.values()):
        return None
    chosen = choose(registry, names, scales, parts, sequences, sources, active)
    start: int | Tensor = 0
    if starts is None:
        start, chosen = _in_this_window(registry, chosen, call, options, generation, window)
    if not chosen:
        return None
    if generation is not None:
        rows_of = generation_rows(registry, generation, batch, start, window)
    else:
        prompt = _find_prompt(registry, call, tokens, starts, start, options)
        columns = shape if not isinstance(start, int) else (batch, start + window)
        mask = call.get("attention_mask")
        given = resolve_given(options.edit_positions, ids, mask, prompt, columns)
        width = window if starts is None else batch * window
        rows_of = _rows_of(registry, prompt, given, ids, batch, start, width)
    plan = make_plan(
        registry, chosen, rows_of, shape,
        sequences=sequences, device=tokens.device, packed=starts is not None,
    )  # fmt: skip
    plan.start, plan.adapters, plan.cache = start, edited_by(chosen), cache_of(call)
    return plan


def edited_by(chosen: list[BatchAdapter]) -> tuple[object, ...]:
    """What tells whether two forwards edit with the same adapters in the same way."""
    return tuple((one.name, one.sequences, one.kept, one.scale) for one in chosen)


def generation_rows(
    registry: AdapterRegistry, generation: Generation, batch: int, start: int | Tensor, window: int
) -> RowsOf:
    """What an adapter edits in some columns of a generation: ``window`` of them from ``start``."""
    prompt = generation.prompt.expand(batch)
    given = expanded(generation.given, batch)
    return _rows_of(registry, prompt, given, generation.ids, batch, start, window)


def _rows_of(
    registry: AdapterRegistry,
    prompt: Prompt,
    given: Tensor | None,
    ids: Tensor | None,
    batch: int,
    start: int | Tensor,
    window: int,
) -> RowsOf:
    def rows(config: ReftConfig, sequences: Tensor | None) -> tuple[Tensor, ...]:
        columns = given
        if config.positions == "image":
            columns = expanded(_images(registry, ids), batch)
        if config.positions == "given" and given is None:
            raise ValueError(
                'edit_positions must be given: the adapter has positions "given", which every '
                "call has to name"
            )
        return member_rows(
            config, prompt,
            window_start=start, window=window, sequences=sequences, chosen=columns,
        )  # fmt: skip

    return rows


def _plan_paged(registry: AdapterRegistry, call: Mapping[str, Any]) -> ForwardPlan | None:
    """The plan of a step of continuous batching.

    Raises:
        ValueError: nobody tells which requests the step computes.
    """
    tokens = call.get("input_ids")
    for engine in registry.engines():
        parts = engine.parts(call.get("cache"))
        if parts is not None and isinstance(tokens, Tensor):
            return plan_engine_step(registry.pool.cache, parts, tokens.shape[1], tokens.device)
    if registry.disabled or registry.active is None:
        return None
    raise ValueError(
        "continuous batching mixes the prompts and the generated tokens of many requests, and "
        "the base model's manager does not tell which is whose; use ReftModel.generate_batch, "
        "or ReftModel.init_continuous_batching"
    )


def _in_this_window(
    registry: AdapterRegistry,
    chosen: list[BatchAdapter],
    call: dict[str, Any],
    options: Options,
    generation: Generation | None,
    window: int,
) -> tuple[int | Tensor, list[BatchAdapter]]:
    """(first column of this forward, the adapters that may edit anything in it)."""
    generated = [one.config.parsed_positions.generated for one in chosen]
    if generation is not None:
        start, beyond = generation.progress(call, window, max([0, *generated]))
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
        if not at_start and registry.causal and options.labels is not None:
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
    registry: AdapterRegistry,
    call: dict[str, Any],
    tokens: Tensor,
    starts: Tensor | None,
    start: int | Tensor,
    options: Options,
) -> Prompt:
    """The prompt that a plain forward's own arguments tell."""
    batch, window = tokens.shape[:2]
    lengths, mask = options.prompt_lengths, call.get("attention_mask")
    first = isinstance(start, int) and start == 0
    labels = options.labels if registry.causal and lengths is None and first else None
    if starts is not None:
        return find_packed_prompt(
            starts.to(tokens.device), batch * window,
            attention_mask=mask, labels=labels, prompt_lengths=lengths,
        )  # fmt: skip
    return find_prompt(
        batch,
        start + window if isinstance(start, int) else window,
        tokens.device,
        attention_mask=mask,
        labels=labels,
        prompt_lengths=lengths,
        shifted=registry.sites.side == "decoder",
    )


def _images(registry: AdapterRegistry, ids: Tensor | None) -> Tensor:
    if ids is None:
        raise ValueError('positions "image" are told by input_ids, got inputs_embeds alone')
    assert registry.image_token is not None  # checked when the adapter was added
    return ids == registry.image_token
