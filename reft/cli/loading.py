"""Loading of models, tokenizers and adapters that the user named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from reft.cli.errors import UserError, one_line
from reft.cli.ranks import local_device
from reft.io.hub_status import hub_reachable, is_hub_name

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_model_name(model: str) -> None:
    """Refuse a name that is neither a model folder nor a possible name on the hub."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            held = "an adapter" if (folder / "adapter_config.json").is_file() else "no config.json"
            raise UserError(f"{model} is not a model folder: it holds {held}")
    elif folder.exists():
        raise UserError(f"{model} is not a model folder: it is a file")
    elif not is_hub_name(model):
        raise UserError(f"no such model folder: {model}")


def resolve_device(name: str) -> Any:
    """Return an available ``torch.device``."""
    import torch

    if name == "auto":
        return torch.device(local_device("cuda") if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--device {name} cannot be used: {first}") from None
    return device


def load_base(
    model: str, *, dtype: str, device: str, num_labels: int | None = None
) -> tuple[Any, Any]:
    """Load a base model in eval mode and its tokenizer.

    With ``num_labels`` it is a sequence classifier, whose head is new if the folder has none; else
    a causal language model.
    """
    if dtype not in _DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(_DTYPES)}; got {dtype!r}")
    check_model_name(model)
    target = resolve_device(device)
    local = Path(model).expanduser()
    folder = str(local) if local.is_dir() else model
    if not local.is_dir():
        _check_hub(model)
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    kind, kwargs = "causal language model", {}
    architecture: Any = AutoModelForCausalLM
    if num_labels is not None:
        kind, kwargs = "model for sequence classification", {"num_labels": num_labels}
        architecture = AutoModelForSequenceClassification
    try:
        base = architecture.from_pretrained(folder, dtype=dtype, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load a {kind} from {model}: {_first(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load a tokenizer from {model}: {_first(error)}") from error
    if num_labels is None:
        _check_causal(base, model)
    elif base.config.pad_token_id is None:
        # A head on the last token needs the padding token to find it.
        base.config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    return base.to(target).eval(), tokenizer


def _check_hub(model: str) -> None:
    """Refuse a name that is not in the cache while the hub cannot be reached."""
    from huggingface_hub import try_to_load_from_cache

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    cached = isinstance(try_to_load_from_cache(model, "config.json"), str)
    if not cached and not hub_reachable():
        raise UserError(
            f"no such model folder: {model}; it is not in the cache and the hub cannot be reached"
        )


def _check_causal(base: Any, model: str) -> None:
    """Refuse an encoder: it loads as a language model, but its tokens attend to the answer."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = base.config.model_type
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if encoder and not getattr(base.config, "is_decoder", False):
        raise UserError(
            f"the model must be a causal language model, {model} is an encoder ({kind})"
        )


def check_adapter(adapter: Path) -> None:
    """Refuse a folder without a readable adapter before the model is loaded."""
    from reft.io.adapter_files import read_adapter

    read_adapter(adapter)


def load_model(model: str, adapter: Path | None, *, dtype: str, device: str) -> tuple[Any, Any]:
    """Load a model, with an adapter if given, and its tokenizer."""
    if adapter is not None:
        check_adapter(adapter)
    base, tokenizer = load_base(model, dtype=dtype, device=device)
    if adapter is None:
        return base, tokenizer
    from reft.model.reft_model import ReftModel

    try:
        return ReftModel.from_pretrained(base, adapter).eval(), tokenizer
    except ValueError as error:
        raise UserError(
            f"the adapter in {adapter} does not fit {model}: {one_line(error)}"
        ) from error


def _first(error: BaseException) -> str:
    """Return the first sentence of an error of transformers."""
    return " ".join(str(error).split("\n\n")[0].split()).split(". ")[0]
