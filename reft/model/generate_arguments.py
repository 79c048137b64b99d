"""The prompt, the adapters and the settings in the arguments of ``generate``."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reft.model.batch import names_of, scales_of
from reft.model.edit_positions import resolve_edit_positions
from reft.model.generation import Generation
from reft.model.peft_compat import transformers_model
from reft.model.prompts import find_prompt
from reft.model.registry import AdapterRegistry


def capture(
    registry: AdapterRegistry,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    prompt_lengths: Tensor | Sequence[int] | None,
    adapter_names: Sequence[str] | None,
    adapter_scales: Any,
    edit_positions: Any,
    subspaces: Any,
) -> Generation:
    """Read the prompt and the adapters of a call ``model.generate(*args, **kwargs)``.

    Without an ``attention_mask``, but with a padding token, the mask that ``generate`` would make
    is made here and put into ``kwargs``, so that both use the same mask.

    Raises:
        TypeError: the model cannot generate.
        TypeError, ValueError: see :func:`reft.model.prompts.find_prompt`,
            :func:`reft.model.edit_positions.given_columns` and
            :func:`reft.model.batch.batch_adapters`.
    """
    if not hasattr(model, "generate"):
        raise TypeError(f"{type(model).__name__} cannot generate")
    in_decoder = registry.blocks.side == "decoder"
    restarts = in_decoder and _generates_itself(model)
    if restarts:
        _refuse_token_arguments(model, args, kwargs, prompt_lengths, edit_positions)
    read_prompt = _decoder_prompt if in_decoder else _prompt
    tokens, mask = read_prompt(model, args, kwargs)
    batch, width = tokens.shape[:2]
    if mask is not None:
        width = mask.shape[1]
    prompt = find_prompt(
        batch, width, tokens.device, attention_mask=mask, prompt_lengths=prompt_lengths
    )
    ids = tokens if tokens.ndim == 2 else None
    given = resolve_edit_positions(edit_positions, ids, mask, prompt, (batch, width))
    scales_of(adapter_scales, batch)
    generation = Generation(
        prompt, width, adapter_names, threading.get_ident(), ids, given, subspaces,
        adapter_scales, restarts=restarts,
    )  # fmt: skip
    generation.check_alike()
    if adapter_names is not None:
        generation.sources = registry.sources(names_of(adapter_names, batch))
    elif registry.active is not None:
        generation.active = registry.active
        generation.sources = registry.sources([registry.active])
    return generation


def _generates_itself(model: nn.Module) -> bool:
    """Whether a model overrides transformers' ``generate``, as Whisper does."""
    from transformers import GenerationMixin

    method = getattr(type(transformers_model(model)), "generate", None)
    return method is not GenerationMixin.generate


def _refuse_token_arguments(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    prompt_lengths: Any,
    edit_positions: Any,
) -> None:
    """Refuse arguments about the tokens of prompts that the model makes itself.

    Raises:
        ValueError: such an argument is given, or there is no cache, whose length shows where a
            prompt starts.
    """
    name = type(transformers_model(model)).__name__
    for argument, value in (("prompt_lengths", prompt_lengths), ("edit_positions", edit_positions)):
        if value is not None:
            raise ValueError(
                f"{argument} cannot be given to the generate() of {name}, which makes the prompts "
                "of its decoder itself"
            )
    if settings_of(model, args, kwargs)("use_cache") is False:
        raise ValueError(
            f"generate() of {name} needs use_cache=True while an adapter edits its decoder: the "
            "cache tells where a prompt ends"
        )


def _prompt(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The tokens that ``generate`` starts with, and their mask."""
    tokens = args[0] if args else None
    main = getattr(model, "main_input_name", "input_ids")  # of Whisper "input_features"
    for name in ("inputs_embeds", "inputs", "input_ids", main):
        if kwargs.get(name) is not None:
            tokens = kwargs[name]
            break
    if tokens is None:  # generation starts from the bos token
        return _one_column(model, 1), None
    mask = kwargs.get("attention_mask")
    if mask is None and tokens.ndim == 2:
        mask = _mask_from_padding(model, tokens, args, kwargs)
        if mask is not None:
            kwargs["attention_mask"] = mask
    return tokens, mask


def _decoder_prompt(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The tokens that an encoder–decoder's decoder starts with, and their mask. ``generate`` puts
    the start token in front of ids that lack it."""
    ids, mask = kwargs.get("decoder_input_ids"), kwargs.get("decoder_attention_mask")
    start = settings_of(model, args, kwargs)("decoder_start_token_id")
    if start is None:
        start = settings_of(model, args, kwargs)("bos_token_id")
    if ids is None:
        source, _ = _prompt(model, args, dict(kwargs))
        return _one_column(model, source.shape[0]), None
    first = torch.as_tensor(start, device=ids.device)
    if bool((ids[:, 0] != first).all()):
        ids = torch.cat([first.expand(ids.shape[0], 1).to(ids.dtype), ids], dim=1)
        if mask is not None:
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
    return ids, mask


def _one_column(model: nn.Module, batch: int) -> Tensor:
    device = next(model.parameters()).device
    return torch.zeros(batch, 1, dtype=torch.int64, device=device)


def settings_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function from a setting's name to the value that ``generate`` will use."""
    explicit = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    configs = (explicit, getattr(model, "generation_config", None))

    def setting(name: str) -> Any:
        if kwargs.get(name) is not None:
            return kwargs[name]
        values = (getattr(config, name, None) for config in configs)
        return next((value for value in values if value is not None), None)

    return setting


def _mask_from_padding(
    model: nn.Module, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The mask of tokens that are not padding; None where the padding token may be text."""
    setting = settings_of(model, args, kwargs)
    pad, eos = setting("pad_token_id"), setting("eos_token_id")
    if isinstance(pad, Tensor):
        pad = pad.tolist()
    if pad is None or isinstance(pad, list):
        return None
    ends = eos.tolist() if isinstance(eos, Tensor) else eos
    if pad in (ends if isinstance(ends, Iterable) else [ends]):
        return None
    mask: Tensor = (tokens != pad).long()
    return mask
