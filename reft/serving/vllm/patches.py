"""Where vLLM has no official seam: its functions are wrapped, each for one reason.

* ``InputProcessor.process_inputs``: a request is refused, or its adapter's content settled, in the
  front end, on the request's own copy of its parameters.
* ``to_beam_search_params`` of the server's requests: beam search passes a client's arguments on to
  nobody, so a request that names an adapter is refused there.
* ``generate_block_hash_extra_keys``: a cached block is another one if other tokens of it were
  edited, or by another adapter.
* ``GPUModelRunner._prepare_inputs`` of Model Runner V1, the one on CPUs: which tokens a step
  computes. V2 has a seam of its own, :mod:`reft.serving.vllm.runner_v2`.

They do nothing for a request without an adapter.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine.input_processor import InputProcessor

from reft.serving.vllm import ARCHITECTURES
from reft.serving.vllm.compatibility import check_engine
from reft.serving.vllm.request_adapter import SCALE, Ticket, asked_for
from reft.serving.vllm.resolver import Admission
from reft.serving.vllm.settings import KEY, Settings

#: Under which an admitted request's ticket travels in its ``extra_args``.
TICKET = "reft_ticket"

_OURS = frozenset({KEY, SCALE, TICKET})

_MARK = "_reft_wraps"


def install() -> None:
    """Wrap the functions, once a process.

    Raises:
        RuntimeError: one of them is not there, or takes other arguments.
    """
    for name in ARCHITECTURES:
        MODELS_CONFIG_MAP.setdefault(name, ReftEngineConfig)
    _wrap(InputProcessor, "process_inputs", ("self", "request_id", "prompt", "params"), _admitting)
    _wrap(InputProcessor, "__init__", ("self", "vllm_config"), _starting)
    name = "generate_block_hash_extra_keys"
    arguments = ("request", "start_token_idx", "end_token_idx", "start_mm_idx")
    _wrap(kv_cache_utils, name, arguments, _keying)
    # Modules that imported the function by its name before.
    wrapped = getattr(kv_cache_utils, name)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and hasattr(module, name):
            setattr(module, name, wrapped)


def install_runner() -> None:
    """Wrap Model Runner V1's function; only workers import that."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    arguments = ("self", "scheduler_output", "num_scheduled_tokens")
    _wrap(GPUModelRunner, "_prepare_inputs", arguments, _preparing)


def ticket_of(params: Any) -> Ticket | None:
    """The ticket of an admitted request."""
    extra = getattr(params, "extra_args", None)
    plain = None if not extra else extra.get(TICKET)
    return None if plain is None else Ticket.from_plain(plain)


class ReftEngineConfig(VerifyAndUpdateConfig):
    """What vLLM asks of an architecture before an engine starts."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        Settings.of(vllm_config.additional_config)
        check_engine(vllm_config)


def _wrap(
    owner: Any, name: str, arguments: tuple[str, ...], make: Callable[[Any], Callable[..., Any]]
) -> None:
    original = getattr(owner, name, None)
    if getattr(original, _MARK, False):
        return
    where = f"{getattr(owner, '__module__', '')}.{getattr(owner, '__name__', owner)}.{name}"
    if original is None:
        raise RuntimeError(f"this vLLM has no {where}, which reft's plugin needs; use vllm 0.32")
    found = tuple(inspect.signature(original).parameters)
    if found[: len(arguments)] != arguments:
        raise RuntimeError(
            f"{where} of this vLLM takes {found}, reft's plugin knows {arguments}; use vllm 0.32"
        )
    wrapped = functools.wraps(original)(make(original))
    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)


# ---------------------------------------------------------------- the front end


def _admitting(original: Any) -> Callable[..., Any]:
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        ticket = _admit(self, prompt, params, kwargs)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        own = request.sampling_params
        if (
            own is not None
            and own.extra_args
            and (KEY in own.extra_args or TICKET in own.extra_args)
        ):
            # On the request's own copy: the client may use its object again.
            rest = {k: v for k, v in own.extra_args.items() if k not in (KEY, TICKET)}
            if ticket is not None:
                rest[TICKET] = ticket.to_plain()
                if ticket.salted:
                    salt = ticket.salt(len(request.prompt_token_ids))
                    request.cache_salt = f"{request.cache_salt or ''}{salt}"
            own.extra_args = rest or None
        return request

    return process_inputs


def _starting(original: Any) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # Only a front end makes one, and only a front end has requests of these kinds.
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        for kind in (ChatCompletionRequest, CompletionRequest):
            _wrap(kind, "to_beam_search_params", ("self",), _refusing_beams)
        original(self, *args, **kwargs)

    return __init__


def _refusing_beams(original: Any) -> Callable[..., Any]:
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.exceptions import VLLMValidationError

        if not _OURS.isdisjoint(self.vllm_xargs or ()):
            raise VLLMValidationError("beam search cannot be edited: leave reft out", parameter=KEY)
        return original(self, *args, **kwargs)

    return to_beam_search_params


def _admit(processor: Any, prompt: Any, params: Any, options: dict[str, Any]) -> Ticket | None:
    from vllm.exceptions import VLLMValidationError

    extra = getattr(params, "extra_args", None) or {}
    try:
        asked = asked_for(extra)
        if asked is None:
            return None
        if processor.model_config.architecture not in ARCHITECTURES:
            raise ValueError(
                f"this engine runs {processor.model_config.architecture}, which has no adapters; "
                f"start it with hf_overrides={{'architectures': ['{next(iter(ARCHITECTURES))}']}}"
            )
        if isinstance(prompt, dict) and (
            "prompt_embeds" in prompt or prompt.get("type") == "embeds"
        ):
            raise ValueError("a prompt of embeddings cannot be edited yet: send tokens or text")
        if options.get("resumable"):
            raise ValueError(
                "a resumable request cannot be edited: the length of its prompt changes"
            )
        admission = processor.__dict__.get("_reft_admission")
        if admission is None:
            text = processor.model_config.hf_text_config
            settings = Settings.of(processor.vllm_config.additional_config)
            admission = Admission(settings, text.num_hidden_layers, text.hidden_size)
            processor._reft_admission = admission
        ticket: Ticket = admission.ticket(*asked)
        return replace(ticket, salted=admission.settings.prefix_keys == "salt")
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter=KEY) from None


# ---------------------------------------------------------------- the scheduler


def _keying(original: Any) -> Callable[..., Any]:
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> Any:
        keys, index = original(request, start_token_idx, end_token_idx, start_mm_idx)
        ticket = ticket_of(request.sampling_params)
        if ticket is None or ticket.salted:
            return keys, index
        own = ticket.block_key(request.num_prompt_tokens, start_token_idx, end_token_idx)
        if own is None:
            return keys, index
        return (*(keys or ()), (KEY, own)), index

    return generate_block_hash_extra_keys


# ---------------------------------------------------------------- the worker


def _preparing(original: Any) -> Callable[..., Any]:
    def _prepare_inputs(
        self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any
    ) -> Any:
        prepared = original(self, scheduler_output, num_scheduled_tokens, *args, **kwargs)
        worker = getattr(self.get_model(), "reft", None)
        if worker is not None:
            batch = self.input_batch
            chunks = []
            for index, req_id in enumerate(batch.req_ids[: batch.num_reqs]):
                ticket = ticket_of(self.requests[req_id].sampling_params)
                start = int(batch.num_computed_tokens_cpu[index])
                count = int(num_scheduled_tokens[index])
                chunks.append((ticket, int(batch.num_prompt_tokens[index]), start, count))
            worker.prepare(chunks, int(scheduler_output.total_num_scheduled_tokens))
        return prepared

    return _prepare_inputs
