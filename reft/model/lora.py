"""Saving PEFT's adapters, such as LoRA, next to an adapter of this library, in PEFT's own files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from reft.adapter.sharding import full_tensor
from reft.io.atomic_write import write_whole
from reft.model import peft_compat

#: The folder inside an adapter's folder. PEFT's layout: adapter "default" is in the folder itself,
#: others are in subfolders of their names, so that
#: ``peft.PeftModel.from_pretrained(base, "checkpoint-10/lora")`` reads it.
FOLDER = "lora"

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_lora(
    base: nn.Module,
    checkpoint: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    writes: bool = True,
) -> None:
    """Write every adapter that PEFT has put into the base; nothing if there is none.

    Args:
        base: the base model, in PEFT's wrapper if it has one.
        checkpoint: the folder in which the folder ``lora`` is made.
        state_dict: the full state dict of the model, if an engine has gathered it; None to read
            the parameters.
        writes: whether this process writes. If ranks hold shards, every rank must call this.
    """
    for name, config in adapters_of(base).items():
        folder = folder_of(checkpoint, name)
        tensors = {
            key: full_tensor(value).to("cpu", copy=True).contiguous()
            for key, value in state_of(base, name, state_dict).items()
        }
        if not writes:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        config.save_pretrained(str(folder))


def warn_of_absent_lora(folder: str | os.PathLike[str], base: nn.Module) -> None:
    """Warn if an adapter was trained together with LoRA layers that the base lacks."""
    lora = Path(folder) / FOLDER
    if lora.is_dir() and not peft_compat.has_layers(base):
        warnings.warn(
            f"{os.fspath(folder)} was trained together with the LoRA in {lora}, which this base "
            f"lacks: load it first, base = peft.PeftModel.from_pretrained(base, {str(lora)!r}), "
            "unless it was merged into this base",
            stacklevel=5,
        )


def adapters_of(base: nn.Module) -> dict[str, Any]:
    """name -> PEFT's configuration, of each adapter that PEFT has put into the base."""
    configs: Any = base.peft_config if peft_compat.has_layers(base) else {}
    return dict(configs)


def folder_of(checkpoint: str | os.PathLike[str], name: str) -> Path:
    """The folder of PEFT's adapter ``name`` in a checkpoint."""
    folder = Path(checkpoint) / FOLDER
    return folder if name == "default" else folder / name


def state_of(base: nn.Module, name: str, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors of PEFT's adapter ``name`` under the names that PEFT stores.

    Args:
        state: the full state dict of the base or of the :class:`reft.ReftModel`; None to read the
            parameters.
    """
    from peft import get_peft_model_state_dict

    if state is not None:
        state = {key.removeprefix("base_model."): value for key, value in state.items()}
    # Without embeddings, PEFT does not ask the hub either whether their size has changed.
    tensors = get_peft_model_state_dict(base, state, adapter_name=name, save_embedding_layers=False)
    return {
        key if key.startswith(PREFIX) else PREFIX + key: value for key, value in tensors.items()
    }
