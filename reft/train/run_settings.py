"""What determines a training run, kept in its checkpoints, and what has changed since."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence, Sized
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from reft.io.atomic_write import write_whole
from reft.safe_read import parse_json, read_text, shown
from reft.train.data_samples import kept_random_state
from reft.train.training_checks import spread_places

if TYPE_CHECKING:
    from reft.train.adapter_trainer import AdapterTrainer

logger = logging.getLogger(__name__)

#: The file in a checkpoint.
FILE = "run_settings.json"

#: Of TrainingArguments: what the weights after a given number of steps depend on.
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

#: How long a run is; a longer one may go on from a shorter one's checkpoint.
_LENGTH = ("max_steps", "num_train_epochs")

#: Examples whose content is looked at.
_HASHED = 64


def settings_of(trainer: AdapterTrainer) -> dict[str, Any]:
    """What determines this run, in values that JSON knows. No random number is drawn."""
    args = trainer.args
    batch = None if args.auto_find_batch_size else trainer.get_total_train_batch_size(args)
    found = {name: getattr(args, name, None) for name in (*_ARGUMENTS, *_LENGTH)}
    with kept_random_state(args.device):
        data = _data_of(trainer.train_dataset)
    return {
        "arguments": {name: _plain(value) for name, value in found.items()},
        "examples_per_step": batch,
        "data": data,
    }


def write(folder: Path, settings: Mapping[str, Any]) -> None:
    """Put the settings into a checkpoint."""
    write_whole(folder / FILE, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def read(checkpoint: str) -> dict[str, Any] | None:
    """The settings of the run that wrote a checkpoint; None of one that has none, as those of
    earlier versions.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(checkpoint) / FILE
    if not path.exists():
        return None
    try:
        found = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("arguments"), dict):
        raise ValueError(f"{path} must hold an object with arguments, got {shown(found)}")
    return found


def state_of(checkpoint: str) -> dict[str, Any]:
    """Trainer's own state in a checkpoint; empty if there is none."""
    path = Path(checkpoint) / TRAINER_STATE_NAME
    found = parse_json(read_text(path)) if path.exists() else {}
    return found if isinstance(found, dict) else {}


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two runs, name -> sentence. How long they are is not looked at."""
    before, after = then["arguments"], now["arguments"]
    found = {
        name: f"{name} was {shown(before[name])}, is {shown(after[name])}"
        for name in _ARGUMENTS
        if name in before and before[name] != after[name]
    }
    old, new = then.get("examples_per_step"), now["examples_per_step"]
    if None not in (old, new) and old != new:
        found["examples_per_step"] = (
            f"examples per step (batch size × accumulation × processes) were {shown(old)}, are "
            f"{new}"
        )
    data = _data_change(then.get("data"), now["data"])
    if data is not None:
        found["data"] = data
    return found


def _data_change(then: Any, now: Mapping[str, Any]) -> str | None:
    if not isinstance(then, dict):
        return None
    old, new = then.get("examples"), now["examples"]
    if None not in (old, new) and old != new:
        return f"the training data had {shown(old)} examples, have {new}"
    old, new = then.get("hash"), now["hash"]
    if None not in (old, new) and old != new:
        return "the training data are others, of the same number of examples"
    return None


def longer(then: Mapping[str, Any], args: Any) -> str | None:
    """That the run has another length than the one before, None if it has not."""
    before, now = then["arguments"], {name: _plain(getattr(args, name)) for name in _LENGTH}
    name = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    if name == "num_train_epochs" and (before.get("max_steps") or 0) > 0:
        return f"max_steps was {shown(before['max_steps'])}, num_train_epochs is {now[name]}"
    if before.get(name) == now[name]:
        return None
    return f"{name} was {shown(before.get(name))}, is {now[name]}"


def too_short(state: Mapping[str, Any], args: Any) -> str | None:
    """That a run of this length has fewer steps than a checkpoint's state, None if not."""
    step, epoch = state.get("global_step"), state.get("epoch")
    if args.max_steps > 0:
        if isinstance(step, int) and step > args.max_steps:
            return f"the checkpoint has {step} steps, max_steps is {args.max_steps}"
    elif isinstance(epoch, (int, float)) and epoch > args.num_train_epochs:
        return (
            f"the checkpoint has {epoch:.3g} epochs, num_train_epochs is {args.num_train_epochs:g}"
        )
    return None


def check_resumed(trainer: AdapterTrainer, checkpoint: str, allow_changes: bool) -> set[str]:
    """Refuse to go on from a checkpoint with another run than the one that wrote it; to be called
    by every rank, since the first one decides.

    Returns:
        Names of what has changed.

    Raises:
        ValueError: the run has changed, or has fewer steps than the checkpoint, unless
            ``allow_changes``; the file of settings is damaged. Nothing was changed.
    """
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if trainer.is_world_process_zero():
        try:
            outcome = [_compared(trainer, checkpoint, allow_changes), None]
        except ValueError as error:
            outcome = [None, str(error)]
    broadcast_object_list(outcome)
    changed, refusal = outcome
    if refusal is not None:
        raise ValueError(refusal)
    return set(changed)


def _compared(trainer: AdapterTrainer, checkpoint: str, allow_changes: bool) -> list[str]:
    then, found = read(checkpoint), {}
    if then is not None:
        found = changes(then, settings_of(trainer))
    short = too_short(state_of(checkpoint), trainer.args)
    if short is not None:
        found["length"] = short
    said = "; ".join(found.values())
    if found and not allow_changes:
        raise ValueError(
            f"resume_from_checkpoint must be of this run, and {checkpoint} is of another: {said}. "
            "Set it back, begin anew, or go on all the same with train(…, allow_changes=True), "
            "--allow-changes of reft train"
        )
    if found:
        logger.warning("%s is of another run: %s", checkpoint, said)
    length = None if then is None else longer(then, trainer.args)
    if length is not None and short is None:
        logger.warning(
            "%s is of a run of another length: %s; the learning rate follows the schedule of the "
            "new length from here on",
            checkpoint,
            length,
        )
    return list(found)


# ---------------------------------------------------------------- changes that are allowed

#: Of the groups of an optimizer: what its stored state would put in the place of what is asked.
_RATES = {
    "learning_rate": ("initial_lr",),
    "weight_decay": ("weight_decay",),
    "adam_beta1": ("betas",),
    "adam_beta2": ("betas",),
    "adam_epsilon": ("eps",),
}


def rates_of(optimizer: Any) -> list[dict[str, Any]]:
    """What is asked of an optimizer, group by group, before a checkpoint's state is loaded."""
    names = {name for several in _RATES.values() for name in several}
    return [
        {name: value for name, value in group.items() if name in names}
        for group in optimizer.param_groups
    ]


def set_rates(
    optimizer: Any, scheduler: Any, asked: Sequence[Mapping[str, Any]], changed: set[str]
) -> None:
    """Let what was changed hold from here on, where a loaded state has put the old in its place.

    Args:
        asked: as :func:`rates_of` found it.
        changed: names of the settings.
    """
    names = {name for setting in changed for name in _RATES.get(setting, ())}
    for group, wanted in zip(optimizer.param_groups, asked, strict=True):
        for name in names & wanted.keys() & group.keys():
            if name == "initial_lr" and group[name]:
                # So far along the schedule as the checkpoint is.
                group["lr"] = wanted[name] * group["lr"] / group[name]
            group[name] = wanted[name]
    if "initial_lr" in names and hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


# ---------------------------------------------------------------- data


def _data_of(data: Any) -> dict[str, Any]:
    """How many examples there are, and a hash of some from all over; None for what a stream, or
    examples that are drawn anew each time, do not tell."""
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
        return {"examples": None, "hash": None}
    hashes = {_hash_of(data) for _ in range(2)}
    return {"examples": len(data), "hash": hashes.pop() if len(hashes) == 1 else None}


def _hash_of(data: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for place in spread_places(len(data), _HASHED):
        _add(digest, data[place])
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Content of an example, the same in every process: no addresses, no order of a dictionary."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{{{key}:".encode())
            _add(digest, value[key])
    elif isinstance(value, Tensor):
        cpu = value.detach().cpu()
        wide = cpu if cpu.dtype != torch.bfloat16 else cpu.float()
        _add(digest, wide.numpy())
    elif isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        digest.update(f"a{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, bytes):
        digest.update(b"b" + value)
    elif value is None or isinstance(value, (str, bool, int, float)):
        digest.update(f"{type(value).__name__}{value!r};".encode(errors="surrogatepass"))
    elif isinstance(value, Sequence):
        digest.update(f"[{len(value)}:".encode())
        for one in value:
            _add(digest, one)
    else:
        digest.update(type(value).__qualname__.encode())


def _plain(value: Any) -> Any:
    """A value of TrainingArguments as JSON has it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)
