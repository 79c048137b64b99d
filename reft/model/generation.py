"""What has to be known about a prompt before ``generate`` hides it behind chunks, beams and
caches, and how far a generation has come."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reft.model.batch import Source, names_of, scales_of, sources_by_name
from reft.model.edit_positions import given_columns
from reft.model.peft_compat import transformers_model
from reft.model.prompts import Prompt, cache_of, find_prompt

if TYPE_CHECKING:
    from reft.model.call_state import Options
    from reft.model.registry import AdapterRegistry


@dataclass(eq=False)
class Generation:
    """The prompt of a generate() in progress.

    Attributes:
        prompt: one entry a sequence, before beams.
        width: columns of the padded prompt.
        adapter_names: one a sequence, or None for the active adapter.
        adapter_scales: one a sequence or one for all, or None for 1.
        sources: what the names, or the active adapter's, stand for, whatever becomes of them
            meanwhile.
        subspaces: one a sequence or one for all, or None for the whole edit.
        thread: whose forwards these are.
        ids: int64 (B, width), the prompt's tokens, None where it came as embeddings.
        given: the columns that ``edit_positions`` says, None where it says nothing.
        active: the adapter that was active when it began, where none are named.
        restarts: the model's own ``generate`` runs several generations, of prompts that it makes
            itself: each begins with a forward on an empty cache.
        seen: columns that went through, as far as the host counts them.
    """

    prompt: Prompt
    width: int
    adapter_names: Sequence[str] | None
    thread: int
    ids: Tensor | None = None
    given: Tensor | None = None
    subspaces: Any = None
    adapter_scales: Any = None
    sources: Mapping[str, Any] | None = None
    active: str | None = None
    restarts: bool = False
    seen: int = 0

    def arrives(self, call: dict[str, Any], tokens: Tensor) -> None:
        """Take the prompt from a forward that begins one, where the model makes prompts itself."""
        if self.restarts and past_length(call) == 0:
            mask = call.get("attention_mask")
            batch, self.width = tokens.shape[:2]
            self.prompt = find_prompt(batch, self.width, tokens.device, attention_mask=mask)
            self.ids = tokens if tokens.ndim == 2 else None
            self.seen = 0

    def settle(self, registry: AdapterRegistry, adapter_scales: Any) -> None:
        """Look up what the names stand for, once, before anything is computed.

        Raises:
            ValueError: an unknown name, names or scales that are not one a sequence.
        """
        batch = self.prompt.length.shape[0]
        scales_of(adapter_scales, batch)
        self.adapter_scales = adapter_scales
        if self.restarts:
            self._check_alike()
        if self.adapter_names is not None:
            names = names_of(registry, self.adapter_names, batch)
            self.sources = sources_by_name(registry, names)
        elif registry.active is not None:
            self.active = registry.active
            self.sources = sources_by_name(registry, [self.active])

    def _check_alike(self) -> None:
        """Refuse what differs from sequence to sequence, where sequences leave the batch.

        Raises:
            ValueError: adapters, scales or subspaces that do.
        """
        for name in ("adapter_names", "adapter_scales", "subspaces"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)):
                continue
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"{name} must be alike for all sequences: this model's generate() lets "
                    "sequences leave the batch and does not tell which; generate for each adapter "
                    f"by itself. Got {values!r}"
                )

    def repeated(self, values: Any, batch: int) -> Any:
        """A list of one value a sequence for ``batch`` sequences, repeated as the prompts are."""
        if not isinstance(values, (list, tuple)) or len(values) == batch:
            return values
        if self.restarts:
            return [*values[:1]] * batch  # they are alike
        times = batch // max(len(values), 1)
        return [value for value in values for _ in range(times)]

    def progress(
        self, call: dict[str, Any], window: int, generated: int
    ) -> tuple[int | Tensor, int]:
        """(first column of this forward, generated tokens that lie before it).

        The second is negative while the prompt is read. A cache that keeps its length on the
        device, or none at all, is not asked: the host counts, until ``generated`` tokens are there.
        """
        past = past_length(call)
        behind = past if isinstance(past, int) else self.seen
        if behind < self.width + generated:
            self.seen = behind + window
        return (behind if past is None else past), behind - self.width


def past_length(call: dict[str, Any]) -> int | Tensor | None:
    """Columns in the cache before this forward: a number, a tensor where the cache keeps it so, or
    None where the cache, that of a state-space model, does not know."""
    cache = cache_of(call)
    if hasattr(cache, "get_seq_length"):
        try:
            seen: int | Tensor = cache.get_seq_length()
            return seen
        except ValueError:
            return None
    if isinstance(cache, (tuple, list)) and cache and isinstance(cache[0], (tuple, list)):
        return int(cache[0][0].shape[-2])
    return 0 if cache is None else None


def known_length(past: int | Tensor | None, window: int) -> int | Tensor | None:
    """The length of a cache outside generate(), in a hand-written loop.

    One on the device is read from there. While compiling it cannot be, and some caches do not know
    theirs: a forward of one column is then taken for what it nearly always is, a step of decoding.

    Raises:
        ValueError: a forward of several columns on a cache that does not tell.
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


def behind_prompts(
    call: dict[str, Any],
    options: Options,
    generation: Generation | None,
    sources: Iterable[Source],
) -> bool:
    """Whether a forward surely edits nothing, told as cheaply as can be: a step of decoding."""
    past = past_length(call)
    if not isinstance(past, int) or not past:
        return False
    spec = [one.config.parsed_positions for one in sources]
    if any(one.kind == "all" for one in spec):
        return False
    latest = max((one.generated for one in spec), default=0)
    if generation is not None:
        return past - generation.width >= latest
    said = (options.prompt_lengths, options.edit_positions, options.labels)
    return not latest and all(one is None for one in said)


def expanded(columns: Tensor | None, batch: int) -> Tensor | None:
    """Columns of the sequences of a generate(), repeated as its beams are."""
    if columns is None or columns.shape[0] in (0, batch):
        return columns
    return columns.repeat_interleave(batch // columns.shape[0], dim=0)


def capture(
    model: nn.Module,
    side: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    prompt_lengths: Tensor | Sequence[int] | None,
    adapter_names: Sequence[str] | None,
    edit_positions: Any,
    subspaces: Any,
) -> Generation:
    """The prompt of a call ``model.generate(*args, **kwargs)``.

    Where no ``attention_mask`` is given and there is a padding token, the mask that generate would
    make is made here and put into ``kwargs``, so that both go by the same one.

    Args:
        side: which stack is edited, see :class:`reft.model.blocks.Sites`.

    Raises:
        TypeError: the model cannot generate.
        TypeError, ValueError: as :func:`reft.model.prompts.find_prompt` and
            :func:`reft.model.edit_positions.given_columns`.
    """
    if not hasattr(model, "generate"):
        raise TypeError(f"{type(model).__name__} cannot generate")
    restarts = side == "decoder" and _generates_itself(model)
    if restarts:
        _refuse_places(model, args, kwargs, prompt_lengths, edit_positions)
    if side == "decoder":
        tokens, mask = _decoder_prompt(model, args, kwargs)
    else:
        tokens, mask = _prompt(model, args, kwargs)
    batch, width = tokens.shape[:2]
    if mask is not None:
        width = mask.shape[1]
    prompt = find_prompt(
        batch, width, tokens.device, attention_mask=mask, prompt_lengths=prompt_lengths
    )
    ids = tokens if tokens.ndim == 2 else None
    given = resolve_given(edit_positions, ids, mask, prompt, (batch, width))
    return Generation(
        prompt, width, adapter_names, threading.get_ident(), ids, given, subspaces,
        restarts=restarts,
    )  # fmt: skip


def _generates_itself(model: nn.Module) -> bool:
    """Whether a model has a ``generate`` of its own, as Whisper, around transformers'."""
    from transformers import GenerationMixin

    own = getattr(type(transformers_model(model)), "generate", None)
    return own is not GenerationMixin.generate


def _refuse_places(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    prompt_lengths: Any,
    edit_positions: Any,
) -> None:
    """Refuse what tells places in prompts that the model makes itself.

    Raises:
        ValueError: places are told, or there is no cache, whose length tells the prompt.
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


def resolve_given(
    value: Any, ids: Tensor | None, mask: Tensor | None, prompt: Prompt, shape: tuple[int, int]
) -> Tensor | None:
    """The columns that an argument ``edit_positions`` says; a function is called here."""
    if callable(value):
        value = value(ids, mask)
    return None if value is None else given_columns(value, prompt, shape)


def _prompt(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
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
    """What the decoder of an encoder–decoder starts from. generate() puts the start token in front
    of ids that lack it."""
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
    """name -> the value that generate() will take for it."""
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    configs = (given, getattr(model, "generation_config", None))

    def setting(name: str) -> Any:
        if kwargs.get(name) is not None:
            return kwargs[name]
        values = (getattr(config, name, None) for config in configs)
        return next((value for value in values if value is not None), None)

    return setting


def _mask_from_padding(
    model: nn.Module, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Attended where there is no padding token; None where padding cannot be told from text."""
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
