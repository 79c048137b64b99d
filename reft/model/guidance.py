"""Classifier-free guidance in ``generate``: the negative prompt is edited at its own first and last
tokens.

transformers' logits processor runs the model on the negative prompt in the middle of a generation.
Here the processor gets a stand-in for the model, which runs the model with that prompt.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from reft.model.edit_positions import resolve_edit_positions
from reft.model.generate_arguments import settings_of
from reft.model.generation import Generation
from reft.model.prompts import find_prompt
from reft.model.registry import AdapterRegistry


class NegativePrompt:
    """The model as the processor calls it: the processor's first call shows the negative prompt.

    Args:
        base: the model.
        registry: its adapters.
        generation: the guided generation, whose adapters also edit the negative prompt.
        edit_positions: as given to ``generate``; a function is called with the negative prompt.
    """

    def __init__(
        self,
        base: nn.Module,
        registry: AdapterRegistry,
        generation: Generation,
        edit_positions: Any,
    ) -> None:
        self.base, self.registry = base, registry
        self.guided, self.edit_positions = generation, edit_positions
        self.generation: Generation | None = None

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        if self.generation is None:
            shape = (input_ids.shape[0], input_ids.shape[1])
            prompt = find_prompt(*shape, input_ids.device, attention_mask=attention_mask)
            given = resolve_edit_positions(
                self.edit_positions, input_ids, attention_mask, prompt, shape
            )
            self.generation = replace(
                self.guided, prompt=prompt, width=shape[1], ids=input_ids, given=given, seen=0
            )
        with self.registry.generating(self.generation):
            return self.base(input_ids, attention_mask=attention_mask, **kwargs)


@contextmanager
def guided(
    base: nn.Module,
    registry: AdapterRegistry,
    generation: Generation,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    edit_positions: Any,
) -> Iterator[dict[str, Any]]:
    """Yield the keywords with which ``base.generate`` guides by a prompt of its own: ``kwargs``
    without guidance.

    Raises:
        ValueError: ``edit_positions`` name tokens of one prompt, and there are two.
    """
    from transformers import LogitsProcessorList, UnbatchedClassifierFreeGuidanceLogitsProcessor

    guiding = UnbatchedClassifierFreeGuidanceLogitsProcessor
    processors = list(kwargs.get("logits_processor") or ())
    given = any(isinstance(processor, guiding) for processor in processors)
    setting = settings_of(base, args, kwargs)
    scale = setting("guidance_scale")
    requested = isinstance(scale, (int, float)) and scale != 1
    if generation.restarts or not (requested or given):
        yield kwargs
        return
    if edit_positions is not None and not callable(edit_positions):
        raise ValueError(
            "edit_positions must be a function of (input_ids, attention_mask) with guidance_scale, "
            "which runs a negative prompt too: one list cannot name tokens of both"
        )
    model: Any = NegativePrompt(base, registry, generation, edit_positions)
    processors = [
        copy.copy(processor) if isinstance(processor, guiding) else processor
        for processor in processors
    ]
    for processor in processors:
        if isinstance(processor, guiding):
            processor.model = model
    if not given:
        # A processor of transformers' own class replaces the one that generate() makes.
        processors.append(
            guiding(
                scale,
                model,
                unconditional_ids=kwargs.get("negative_prompt_ids"),
                unconditional_attention_mask=kwargs.get("negative_prompt_attention_mask"),
                use_cache=setting("use_cache") is not False,
            )
        )
    log, quiet = logging.getLogger("transformers.generation.utils"), _NotReplaced()
    log.addFilter(quiet)
    try:
        yield {**kwargs, "logits_processor": LogitsProcessorList(processors)}
    finally:
        log.removeFilter(quiet)


class _NotReplaced(logging.Filter):
    """Drops the warning that the processor above replaces transformers' own."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "FreeGuidanceLogitsProcessor" not in record.getMessage()
