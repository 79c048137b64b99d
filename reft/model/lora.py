"""The adapters that PEFT holds beside ours, on disk: PEFT's own files in a folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import Tensor, nn

from reft.adapter.sharding import full_tensor
from reft.io.atomic_write import write_whole
from reft.model import peft_compat as peft_base

if TYPE_CHECKING:
    from reft.model.reft_model import ReftModel

#: The folder beside an adapter. PEFT's adapter "default" lies in it, as PEFT has it, others in
#: folders of their names: ``peft.PeftModel.from_pretrained(base, "checkpoint-10/lora")`` reads it.
FOLDER = "lora"

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_lora(
    model: ReftModel,
    checkpoint: str | os.PathLike[str],
    state_dict: Any = None,
    *,
    writes: bool = True,
) -> None:
    """Write every adapter that PEFT has put into the base; nothing if there is none.

    Args:
        model: the wrapped model.
        checkpoint: the folder in which ``lora`` is made.
        state_dict: the model's whole state, where an engine has gathered it; None to read the
            parameters.
        writes: whether this process does; every one has to call where ranks hold parts.
    """
    for name, config in adapters_of(model).items():
        folder = folder_of(checkpoint, name)
        tensors = {
            key: full_tensor(value).to("cpu", copy=True).contiguous()
            for key, value in state_of(model.base_model, name, state_dict).items()
        }
        if not writes:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        config.save_pretrained(str(folder))


def warn_of_absent_lora(folder: str | os.PathLike[str], base: nn.Module) -> None:
    """Warn where an adapter was trained beside LoRA that the base has not."""
    beside = Path(folder) / FOLDER
    if beside.is_dir() and not peft_base.has_layers(base):
        warnings.warn(
            f"{os.fspath(folder)} was trained beside the LoRA in {beside}, which this base has "
            f"not: load it first, base = peft.PeftModel.from_pretrained(base, {str(beside)!r}), "
            "unless it was merged into this base",
            stacklevel=5,
        )


def adapters_of(model: ReftModel) -> dict[str, Any]:
    """name -> PEFT's configuration, of each adapter in the base."""
    base = model.base_model
    configs: Any = base.peft_config if peft_base.has_layers(base) else {}
    return dict(configs)


def folder_of(checkpoint: str | os.PathLike[str], name: str) -> Path:
    folder = Path(checkpoint) / FOLDER
    return folder if name == "default" else folder / name


def state_of(base: nn.Module, name: str, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """An adapter's tensors under the names that PEFT stores."""
    from peft import get_peft_model_state_dict

    if state is not None:
        state = {key.removeprefix("base_model."): value for key, value in state.items()}
    # Nor does it ask the hub then whether the base's embeddings are what they were.
    found = get_peft_model_state_dict(base, state, adapter_name=name, save_embedding_layers=False)
    return {key if key.startswith(PREFIX) else PREFIX + key: value for key, value in found.items()}
