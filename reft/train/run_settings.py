"""Settings that determine a training run: saved in its checkpoints, compared when it resumes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence, Sized
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from reft.io.atomic_write import write_whole
from reft.safe_read import parse_json, read_text, shown
from reft.train.data_samples import preserve_random_state, spread_indices

logger = logging.getLogger(__name__)

#: The file of the settings in a checkpoint.
FILE = "run_settings.json"

#: Fields of TrainingArguments that determine the weights after a given number of steps.
_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "seed",
    "data_seed",
)

#: Fields of TrainingArguments for the length of a run, which may increase when it resumes.
_LENGTH = ("max_steps", "num_train_epochs")

#: The number of examples whose content is hashed.
_HASHED = 64


def settings_of(trainer: Trainer) -> dict[str, Any]:
    """Return the settings of a run as JSON values, without changing the random state."""
    args = trainer.args
    batch = None if args.auto_find_batch_size else trainer.get_total_train_batch_size(args)
    arguments = {name: getattr(args, name, None) for name in (*_ARGUMENTS, *_LENGTH)}
    with preserve_random_state(args.device):
        data = _describe_data(trainer.train_dataset)
    return {
        "arguments": {name: _to_json(value) for name, value in arguments.items()},
        "examples_per_step": batch,
        "data": data,
    }


def write(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings into a checkpoint."""
    write_whole(folder / FILE, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def read(checkpoint: str) -> dict[str, Any] | None:
    """Read the settings of the run that wrote a checkpoint, None for a checkpoint without settings,
    which earlier versions wrote.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(checkpoint) / FILE
    if not path.exists():
        return None
    try:
        settings = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("arguments"), dict):
        raise ValueError(f"{path} must hold an object with arguments, got {shown(settings)}")
    return settings


def state_of(checkpoint: str) -> dict[str, Any]:
    """Return Trainer's state in a checkpoint, empty if there is none."""
    path = Path(checkpoint) / TRAINER_STATE_NAME
    state = parse_json(read_text(path)) if path.exists() else {}
    return state if isinstance(state, dict) else {}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Describe what differs between two runs apart from their length, name -> sentence."""
    before, after = then["arguments"], now["arguments"]
    sentences = {
        name: f"{name} was {shown(before[name])}, is {shown(after[name])}"
        for name in _ARGUMENTS
        if name in before and before[name] != after[name]
    }
    old, new = then.get("examples_per_step"), now["examples_per_step"]
    if None not in (old, new) and old != new:
        sentences["examples_per_step"] = (
            f"examples per step (batch size × accumulation × processes) were {shown(old)}, are "
            f"{new}"
        )
    data = _data_difference(then.get("data"), now["data"])
    if data is not None:
        sentences["data"] = data
    return sentences


def _data_difference(then: Any, now: Mapping[str, Any]) -> str | None:
    if not isinstance(then, dict):
        return None
    old, new = then.get("examples"), now["examples"]
    if None not in (old, new) and old != new:
        return f"the training data had {shown(old)} examples, have {new}"
    old, new = then.get("hash"), now["hash"]
    if None not in (old, new) and old != new:
        return "the training data differ, with the same number of examples"
    return None


def length_difference(then: Mapping[str, Any], args: Any) -> str | None:
    """Describe how the length of the run has changed, None if it is the same."""
    before, now = then["arguments"], {name: _to_json(getattr(args, name)) for name in _LENGTH}
    name = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    if name == "num_train_epochs" and (before.get("max_steps") or 0) > 0:
        return f"max_steps was {shown(before['max_steps'])}, num_train_epochs is {now[name]}"
    if before.get(name) == now[name]:
        return None
    return f"{name} was {shown(before.get(name))}, is {now[name]}"


def too_short(state: Mapping[str, Any], args: Any) -> str | None:
    """Describe how the run is shorter than the checkpoint's training so far, None if it is not."""
    step, epoch = state.get("global_step"), state.get("epoch")
    if args.max_steps > 0:
        if isinstance(step, int) and step > args.max_steps:
            return f"the checkpoint has {step} steps, max_steps is {args.max_steps}"
    elif isinstance(epoch, (int, float)) and epoch > args.num_train_epochs:
        return (
            f"the checkpoint has {epoch:.3g} epochs, num_train_epochs is {args.num_train_epochs:g}"
        )
    return None


def check_resumed(trainer: Trainer, checkpoint: str, allow_changes: bool) -> set[str]:
    """Refuse to resume a run whose settings differ from those in the checkpoint.

    Every rank must call this; rank 0 decides.

    Returns:
        The names of the settings that differ.

    Raises:
        ValueError: settings differ, or the run has fewer steps than the checkpoint, and
            ``allow_changes`` is False; or the file of settings is damaged. Nothing was changed.
    """
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if trainer.is_world_process_zero():
        try:
            outcome = [_compare(trainer, checkpoint, allow_changes), None]
        except ValueError as error:
            outcome = [None, str(error)]
    broadcast_object_list(outcome)
    changed, refusal = outcome
    if refusal is not None:
        raise ValueError(refusal)
    return set(changed)


def _compare(trainer: Trainer, checkpoint: str, allow_changes: bool) -> list[str]:
    then, changed = read(checkpoint), {}
    if then is not None:
        changed = differences(then, settings_of(trainer))
    short = too_short(state_of(checkpoint), trainer.args)
    if short is not None:
        changed["length"] = short
    sentences = "; ".join(changed.values())
    if changed and not allow_changes:
        raise ValueError(
            f"resume_from_checkpoint must belong to this run, {checkpoint} belongs to another: "
            f"{sentences}. Restore these settings, begin a new run, or resume with "
            "train(…, allow_changes=True), --allow-changes of reft train"
        )
    if changed:
        logger.warning("%s belongs to another run: %s", checkpoint, sentences)
    length = None if then is None else length_difference(then, trainer.args)
    if length is not None and short is None:
        logger.warning(
            "%s belongs to a run of another length: %s; the learning rate follows the schedule of "
            "the new length from here on",
            checkpoint,
            length,
        )
    return list(changed)


# ---------------------------------------------------------------- changes that are allowed

#: Setting -> keys of an optimizer's groups that loading its state would set to the old value.
_GROUP_KEYS = {
    "learning_rate": ("initial_lr",),
    "weight_decay": ("weight_decay",),
    "adam_beta1": ("betas",),
    "adam_beta2": ("betas",),
    "adam_epsilon": ("eps",),
}


def optimizer_settings(optimizer: Any) -> list[dict[str, Any]]:
    """Return the requested settings of an optimizer, group by group, before a checkpoint's state
    replaces them."""
    keys = {key for group_keys in _GROUP_KEYS.values() for key in group_keys}
    return [
        {key: value for key, value in group.items() if key in keys}
        for group in optimizer.param_groups
    ]


def apply_changes(
    optimizer: Any, scheduler: Any, requested: Sequence[Mapping[str, Any]], changed: set[str]
) -> None:
    """Apply changed settings after a checkpoint's state has set the optimizer to the old ones.

    Args:
        optimizer: the optimizer, with the loaded state.
        scheduler: its learning rate scheduler, with the loaded state.
        requested: the result of :func:`optimizer_settings` before the state was loaded.
        changed: the names of the settings that differ.
    """
    keys = {key for setting in changed for key in _GROUP_KEYS.get(setting, ())}
    for group, settings in zip(optimizer.param_groups, requested, strict=True):
        for key in keys & settings.keys() & group.keys():
            if key == "initial_lr" and group[key]:
                # Scale the current rate: the schedule continues where the checkpoint is.
                group["lr"] = settings[key] * group["lr"] / group[key]
            group[key] = settings[key]
    if "initial_lr" in keys and hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


# ---------------------------------------------------------------- data


def _describe_data(data: Any) -> dict[str, Any]:
    """Return the number of examples and a hash of a sample.

    Both are None for a stream; the hash is None for examples that differ each time they are read.
    """
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
        return {"examples": None, "hash": None}
    hashes = {_hash_of(data) for _ in range(2)}
    return {"examples": len(data), "hash": hashes.pop() if len(hashes) == 1 else None}


def _hash_of(data: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for index in spread_indices(len(data), _HASHED):
        _update(digest, data[index])
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    """Add the content of an example to a hash that is the same in every process: it contains no
    addresses and does not depend on the order of keys."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{{{key}:".encode())
            _update(digest, value[key])
    elif isinstance(value, Tensor):
        cpu = value.detach().cpu()
        array = (cpu if cpu.dtype != torch.bfloat16 else cpu.float()).numpy()
        _update(digest, array)
    elif isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        digest.update(f"a{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, bytes):
        digest.update(b"b" + value)
    elif value is None or isinstance(value, (str, bool, int, float)):
        digest.update(f"{type(value).__name__}{value!r};".encode(errors="surrogatepass"))
    elif isinstance(value, Sequence):
        digest.update(f"[{len(value)}:".encode())
        for element in value:
            _update(digest, element)
    else:
        digest.update(type(value).__qualname__.encode())


def _to_json(value: Any) -> Any:
    """Convert a value of TrainingArguments to a JSON value."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _to_json(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(element) for element in value]
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)
