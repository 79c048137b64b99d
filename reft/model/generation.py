"""What has to be known about a prompt before ``generate`` hides it behind chunks, beams and
caches."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reft.model.attachment import Generation
from reft.model.plan import Prompt, find_prompt


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    prompt_lengths: Tensor | Sequence[int] | None,
    adapter_names: Sequence[str] | None,
) -> Generation:
    """The prompt of a call ``model.generate(*args, **kwargs)``.

    Where no ``attention_mask`` is given and there is a padding token, the mask that generate would
    make is made here and put into ``kwargs``, so that both go by the same one.

    Raises:
        TypeError: the model cannot generate.
        TypeError, ValueError: as :func:`reft.model.plan.find_prompt`.
    """
    if not hasattr(model, "generate"):
        raise TypeError(f"{type(model).__name__} cannot generate")
    tokens = args[0] if args else None
    for name in ("inputs_embeds", "inputs", "input_ids"):
        if kwargs.get(name) is not None:
            tokens = kwargs[name]
            break
    thread = threading.get_ident()
    if tokens is None:  # generation starts from the bos token
        device = next(model.parameters()).device
        one = torch.ones(1, dtype=torch.int64, device=device)
        return Generation(Prompt(one - 1, one), 1, adapter_names, thread)
    mask = kwargs.get("attention_mask")
    if mask is None and tokens.ndim == 2:
        mask = _mask_from_padding(model, tokens, args, kwargs)
        if mask is not None:
            kwargs["attention_mask"] = mask
    batch, width = tokens.shape[:2]
    if mask is not None:
        width = mask.shape[1]
    prompt = find_prompt(
        batch, width, tokens.device, attention_mask=mask, prompt_lengths=prompt_lengths
    )
    return Generation(prompt, width, adapter_names, thread)


def _mask_from_padding(
    model: nn.Module, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Attended where there is no padding token; None where padding cannot be told from text."""
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    configs = (given, getattr(model, "generation_config", None))

    def setting(name: str) -> Any:
        if kwargs.get(name) is not None:
            return kwargs[name]
        values = (getattr(config, name, None) for config in configs)
        return next((value for value in values if value is not None), None)

    pad, eos = setting("pad_token_id"), setting("eos_token_id")
    if isinstance(pad, Tensor):
        pad = pad.tolist()
    if pad is None or isinstance(pad, list):
        return None
    ends = eos.tolist() if isinstance(eos, Tensor) else eos
    if pad in (ends if isinstance(ends, Iterable) else [ends]):
        return None
    return (tokens != pad).long()
