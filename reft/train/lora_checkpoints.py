"""Restoring PEFT's adapters of the base model when a run resumes from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from reft.adapter.sharding import local_shard
from reft.adapter.tensor_checks import check_numbers
from reft.io.tensor_files import read_tensors
from reft.model import peft_compat as peft_base
from reft.model.lora import PREFIX, WEIGHTS, adapters_of, folder_of, state_of
from reft.model.reft_model import ReftModel


def read_lora(model: ReftModel, checkpoint: str | os.PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """Read the tensors of every PEFT adapter of the base model from a checkpoint.

    Returns:
        The tensors that ``save_lora`` wrote, by adapter and name.

    Raises:
        FileNotFoundError: an adapter is not in the checkpoint.
        ValueError: a file is damaged, or its tensors differ from the model's in names or shapes, or
            are not finite.
    """
    base, adapters = model.base_model, {}
    for name in adapters_of(model):
        file = folder_of(checkpoint, name) / WEIGHTS
        if not file.is_file():
            raise FileNotFoundError(
                f"the base model has PEFT's adapter {name!r}, the checkpoint has no {file}"
            )
        present, tensors = state_of(base, name, None), read_tensors(file)
        expected = {key: value.shape for key, value in present.items()}
        stored = {key: value.shape for key, value in tensors.items()}
        differing = sorted(dict(expected.items() ^ stored.items()))
        if differing:
            raise ValueError(
                f"{file} must hold the tensors of PEFT's adapter {name!r} of this model; "
                f"{len(differing)} of them differ, such as {differing[0]}"
            )
        for key, value in tensors.items():
            check_numbers(f"{file}: {key}", value)
        adapters[name] = {key: local_shard(value, present[key]) for key, value in tensors.items()}
    return adapters


def set_lora(model: ReftModel, adapters: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Load the result of :func:`read_lora` into PEFT's adapters."""
    if not adapters:
        return
    from peft import set_peft_model_state_dict

    base = model.base_model
    for name, tensors in adapters.items():
        if not peft_base.is_wrapper(base):
            tensors = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
        set_peft_model_state_dict(base, tensors, adapter_name=name)
