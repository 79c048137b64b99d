"""The adapters that PEFT holds beside ours, in a checkpoint: PEFT's own files in a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from reft.atomic import write_whole
from reft.model import peft_base
from reft.model.reft_model import ReftModel
from reft.nn.published import check_numbers
from reft.nn.shards import part_of
from reft.nn.tensor_files import read_tensors

#: The folder in a checkpoint. The adapter "default" lies in it, as PEFT has it, others in folders
#: of their names: ``peft.PeftModel.from_pretrained(base, "checkpoint-10/lora")`` reads it.
FOLDER = "lora"

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_lora(model: ReftModel, checkpoint: str | os.PathLike[str], state_dict: Any = None) -> None:
    """Write every adapter that PEFT has put into the base; nothing if there is none.

    Args:
        model: the wrapped model.
        checkpoint: the folder in which ``lora`` is made.
        state_dict: the model's whole state, where an engine has gathered it; None to read the
            parameters.
    """
    for name, config in _adapters(model).items():
        folder = _folder(checkpoint, name)
        tensors = {
            key: value.detach().to("cpu", copy=True).contiguous()
            for key, value in _state(model.base_model, name, state_dict).items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _WEIGHTS, save(tensors, metadata={"format": "pt"}))
        config.save_pretrained(str(folder))


def read_lora(model: ReftModel, checkpoint: str | os.PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """name -> what :func:`save_lora` wrote, of every adapter that PEFT has put into the base.

    Raises:
        FileNotFoundError: an adapter is not in the checkpoint.
        ValueError: a file that is damaged, or tensors that are not those of the model's, or not
            finite.
    """
    base, found = model.base_model, {}
    for name in _adapters(model):
        file = _folder(checkpoint, name) / _WEIGHTS
        if not file.is_file():
            raise FileNotFoundError(
                f"the base model has PEFT's adapter {name!r}, the checkpoint has no {file}"
            )
        present, tensors = _state(base, name, None), read_tensors(file)
        wanted = {key: value.shape for key, value in present.items()}
        stored = {key: value.shape for key, value in tensors.items()}
        differing = sorted(dict(wanted.items() ^ stored.items()))
        if differing:
            raise ValueError(
                f"{file} must hold the tensors of PEFT's adapter {name!r} as this model has it; "
                f"{len(differing)} of them differ, {differing[0]} for one"
            )
        for key, value in tensors.items():
            check_numbers(f"{file}: {key}", value)
        found[name] = {key: part_of(value, present[key]) for key, value in tensors.items()}
    return found


def set_lora(model: ReftModel, found: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Set PEFT's adapters to what :func:`read_lora` read."""
    if not found:
        return
    from peft import set_peft_model_state_dict

    base = model.base_model
    for name, tensors in found.items():
        if not peft_base.is_wrapper(base):
            tensors = {key.removeprefix(_PREFIX): value for key, value in tensors.items()}
        set_peft_model_state_dict(base, tensors, adapter_name=name)


def _adapters(model: ReftModel) -> dict[str, Any]:
    """name -> PEFT's configuration, of each adapter in the base."""
    base = model.base_model
    configs: Any = base.peft_config if peft_base.has_layers(base) else {}
    return dict(configs)


def _folder(checkpoint: str | os.PathLike[str], name: str) -> Path:
    folder = Path(checkpoint) / FOLDER
    return folder if name == "default" else folder / name


def _state(base: nn.Module, name: str, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """An adapter's tensors under the names that PEFT stores."""
    from peft import get_peft_model_state_dict

    if state is not None:
        state = {key.removeprefix("base_model."): value for key, value in state.items()}
    # Nor does it ask the hub then whether the base's embeddings are what they were.
    found = get_peft_model_state_dict(base, state, adapter_name=name, save_embedding_layers=False)
    return {
        key if key.startswith(_PREFIX) else _PREFIX + key: value for key, value in found.items()
    }
