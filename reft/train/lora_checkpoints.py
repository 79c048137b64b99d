"""The adapters that PEFT holds beside ours, when a run goes on from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from reft.adapter.sharding import part_of
from reft.adapter.tensor_checks import check_numbers
from reft.io.tensor_files import read_tensors
from reft.model import peft_compat as peft_base
from reft.model.lora import PREFIX, WEIGHTS, adapters_of, folder_of, state_of
from reft.model.reft_model import ReftModel


def read_lora(model: ReftModel, checkpoint: str | os.PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """name -> what ``save_lora`` wrote, of every adapter that PEFT has put into the base.

    Raises:
        FileNotFoundError: an adapter is not in the checkpoint.
        ValueError: a file that is damaged, or tensors that are not those of the model's, or not
            finite.
    """
    base, found = model.base_model, {}
    for name in adapters_of(model):
        file = folder_of(checkpoint, name) / WEIGHTS
        if not file.is_file():
            raise FileNotFoundError(
                f"the base model has PEFT's adapter {name!r}, the checkpoint has no {file}"
            )
        present, tensors = state_of(base, name, None), read_tensors(file)
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
            tensors = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
        set_peft_model_state_dict(base, tensors, adapter_name=name)
