"""Patches of vLLM: functions are wrapped where vLLM has no extension point.

* ``InputProcessor.process_inputs`` resolves the adapter of a request in the front end, on the
  request's copy of its parameters, or refuses the request.
* ``to_beam_search_params`` of the server's requests refuses a request with an adapter: beam search
  drops a client's ``extra_args``.
* ``generate_block_hash_extra_keys`` adds the adapter and the edited tokens to the key of a cached
  block.
* ``GPUModelRunner._prepare_inputs`` of Model Runner V1, used on CPUs, plans the edits of a step. V2
  has an extension point, see :mod:`reft.serving.vllm.runner_v2`.

Without an adapter a request passes unchanged.
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
from reft.serving.vllm.request_adapter import SCALE, RequestAdapter, requested_adapter
from reft.serving.vllm.resolver import Resolver
from reft.serving.vllm.settings import KEY, Settings

#: The key in ``extra_args`` of an accepted request that holds its :class:`RequestAdapter`.
RESOLVED = "reft_resolved"

_REFT_KEYS = frozenset({KEY, SCALE, RESOLVED})

#: Attribute that marks a wrapped function.
_PATCHED = "_reft_wraps"


def install() -> None:
    """Install the patches of the front end and the scheduler, once a process.

    Raises:
        RuntimeError: a function is missing, or takes other arguments.
    """
    for name in ARCHITECTURES:
        MODELS_CONFIG_MAP.setdefault(name, ReftEngineConfig)
    _wrap(InputProcessor, "process_inputs", ("self", "request_id", "prompt", "params"), _resolving)
    _wrap(InputProcessor, "__init__", ("self", "vllm_config"), _refusing_beam_search)
    name = "generate_block_hash_extra_keys"
    arguments = ("request", "start_token_idx", "end_token_idx", "start_mm_idx")
    _wrap(kv_cache_utils, name, arguments, _keying)
    # Modules that imported the function itself before.
    wrapped = getattr(kv_cache_utils, name)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and hasattr(module, name):
            setattr(module, name, wrapped)


def install_runner() -> None:
    """Install the patch of Model Runner V1, which only workers import."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    arguments = ("self", "scheduler_output", "num_scheduled_tokens")
    _wrap(GPUModelRunner, "_prepare_inputs", arguments, _preparing)


def request_adapter_of(params: Any) -> RequestAdapter | None:
    """Return the adapter of an accepted request."""
    extra = getattr(params, "extra_args", None)
    values = None if not extra else extra.get(RESOLVED)
    return None if values is None else RequestAdapter.from_dict(values)


class ReftEngineConfig(VerifyAndUpdateConfig):
    """The check that vLLM calls for an architecture before an engine starts."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        Settings.of(vllm_config.additional_config)
        check_engine(vllm_config)


def _wrap(
    owner: Any, name: str, arguments: tuple[str, ...], make: Callable[[Any], Callable[..., Any]]
) -> None:
    original = getattr(owner, name, None)
    if getattr(original, _PATCHED, False):
        return
    path = f"{getattr(owner, '__module__', '')}.{getattr(owner, '__name__', owner)}.{name}"
    if original is None:
        raise RuntimeError(f"this vLLM has no {path}, which reft's plugin needs; use vllm 0.32")
    parameters = tuple(inspect.signature(original).parameters)
    if parameters[: len(arguments)] != arguments:
        raise RuntimeError(
            f"{path} of this vLLM takes {parameters}, reft's plugin expects {arguments}; use vllm "
            "0.32"
        )
    wrapped = functools.wraps(original)(make(original))
    setattr(wrapped, _PATCHED, True)
    setattr(owner, name, wrapped)


# ---------------------------------------------------------------- the front end


def _resolving(original: Any) -> Callable[..., Any]:
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        adapter = _resolve(self, prompt, params, kwargs)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        sampling = request.sampling_params
        extra = None if sampling is None else sampling.extra_args
        if extra and (KEY in extra or RESOLVED in extra):
            # Written into the request's copy: the client may reuse its object.
            rest = {key: value for key, value in extra.items() if key not in (KEY, RESOLVED)}
            if adapter is not None:
                rest[RESOLVED] = adapter.to_dict()
                if adapter.salted:
                    salt = adapter.salt(len(request.prompt_token_ids))
                    request.cache_salt = f"{request.cache_salt or ''}{salt}"
            sampling.extra_args = rest or None
        return request

    return process_inputs


def _refusing_beam_search(original: Any) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # Only a front end makes an InputProcessor and gets requests of these classes.
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        for kind in (ChatCompletionRequest, CompletionRequest):
            _wrap(kind, "to_beam_search_params", ("self",), _refusing_adapters)
        original(self, *args, **kwargs)

    return __init__


def _refusing_adapters(original: Any) -> Callable[..., Any]:
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.exceptions import VLLMValidationError

        if not _REFT_KEYS.isdisjoint(self.vllm_xargs or ()):
            raise VLLMValidationError("beam search cannot be edited: leave reft out", parameter=KEY)
        return original(self, *args, **kwargs)

    return to_beam_search_params


def _resolve(
    processor: Any, prompt: Any, params: Any, options: dict[str, Any]
) -> RequestAdapter | None:
    """Resolve the adapter that a client's request names; None if it names none.

    Raises:
        VLLMValidationError: the request cannot be served.
    """
    from vllm.exceptions import VLLMValidationError

    extra = getattr(params, "extra_args", None) or {}
    try:
        requested = requested_adapter(extra)
        if requested is None:
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
        resolver: Resolver | None = processor.__dict__.get("_reft_resolver")
        if resolver is None:
            text = processor.model_config.hf_text_config
            settings = Settings.of(processor.vllm_config.additional_config)
            resolver = Resolver(settings, text.num_hidden_layers, text.hidden_size)
            processor._reft_resolver = resolver
        adapter = resolver.resolve(*requested)
        return replace(adapter, salted=resolver.settings.prefix_keys == "salt")
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter=KEY) from None


# ---------------------------------------------------------------- the scheduler


def _keying(original: Any) -> Callable[..., Any]:
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> Any:
        keys, index = original(request, start_token_idx, end_token_idx, start_mm_idx)
        adapter = request_adapter_of(request.sampling_params)
        if adapter is None or adapter.salted:
            return keys, index
        block_key = adapter.block_key(request.num_prompt_tokens, start_token_idx, end_token_idx)
        if block_key is None:
            return keys, index
        return (*(keys or ()), (KEY, block_key)), index

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
                adapter = request_adapter_of(self.requests[req_id].sampling_params)
                start = int(batch.num_computed_tokens_cpu[index])
                count = int(num_scheduled_tokens[index])
                chunks.append((adapter, int(batch.num_prompt_tokens[index]), start, count))
            worker.prepare(chunks, int(scheduler_output.total_num_scheduled_tokens))
        return prepared

    return _prepare_inputs
