"""Checkpoints that are there whole or not at all, and finding the one to go on from.

Trainer writes a checkpoint file by file. Here it does so in a folder that nobody takes for a
checkpoint; when every rank is done the files are flushed to the disk and the folder gets its name,
in one step. Whatever moment a kill, a power cut or a full disk picks, ``checkpoint-N`` is whole.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from reft.config import FLOATS
from reft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from reft.io.atomic_write import flush_folder, write_whole
from reft.io.tensor_files import load_plain
from reft.safe_read import parse_json, read_text, require_plain

#: Where a checkpoint is written, beside the others.
UNFINISHED = ".unfinished"

#: Files of Trainer's that are read when training goes on.
_STATES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")

_REPLACED = "replaced-"

#: Bytes that a disk has room for unless it is full.
_ROOM = 1 << 20


def last_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint in a folder, None if there is none.

    Of other libraries' checkpoints, and of those of earlier versions, one without
    ``trainer_state.json``, which Trainer writes last, or with half of it, is passed over.
    """
    _put_back(Path(folder))
    found = [one for one in _numbered(Path(folder)) if _is_whole(one[1])]
    return max(found)[1] if found else None


def require_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds no checkpoint of a training run, saying what it is.

    Raises:
        ValueError: there is no such folder; it is an adapter as it is published, or anything else
            without Trainer's state.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"resume_from_checkpoint must be a folder, there is none at {path}")
    if (path / TRAINER_STATE_NAME).exists():
        return
    inside = last_checkpoint(path)
    more = "" if inside is None else f". The last checkpoint in it is {inside}"
    if (path / CONFIG_FILE).exists() or (path / WEIGHTS_FILE).exists():
        raise ValueError(
            f"resume_from_checkpoint must be a checkpoint of a training run, {path} is an adapter "
            f"and no checkpoint (it has no {TRAINER_STATE_NAME}): to train it further, load it "
            f"with ReftModel.from_pretrained(base_model, {str(path)!r}, is_trainable=True) and "
            f"call train() without resume_from_checkpoint{more}"
        )
    raise ValueError(
        f"resume_from_checkpoint must be a checkpoint of a training run, {path} is no checkpoint "
        f"(it has no {TRAINER_STATE_NAME}){more}"
    )


def check_states(checkpoint: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint of which Trainer could not read a file, before anything is restored.

    No pickle is executed: what holds code is refused. ``training_args.bin`` is not read.

    Raises:
        ValueError: a file of optimizer, scheduler, scaler or random numbers that is damaged, holds
            code or numbers that are not finite, or a damaged ``trainer_state.json``.
    """
    folder = Path(checkpoint)
    state = folder / TRAINER_STATE_NAME
    if state.exists():
        text = read_text(state)
        try:
            whole = isinstance(parse_json(text), dict)
        except ValueError as error:
            raise ValueError(f"{state}: {error}") from None
        if not whole:
            raise ValueError(f"{state} must hold an object in JSON")
    for name in _STATES:
        for file in sorted(folder.glob(name)):
            _check_finite(file, read_state(file))


def read_state(file: Path) -> Any:
    """What a file of ``torch.save`` holds, on the CPU; no code in it is run.

    Raises:
        OSError: it is not there or cannot be read.
        ValueError: it is damaged or holds code.
    """
    require_plain(file)
    try:
        with safe_globals():  # numpy's, of the state of its random numbers
            return load_plain(file)
    except ValueError as error:
        raise ValueError(f"{file} {error}") from None


def _check_finite(file: Path, value: Any, name: str = "") -> None:
    if isinstance(value, dict):
        for key, one in value.items():
            _check_finite(file, one, f"{name}.{key}" if name else str(key))
    elif isinstance(value, torch.Tensor) and value.dtype in FLOATS and not value.isfinite().all():
        raise ValueError(
            f"{file} must be finite, {name} holds NaN or infinity: the run had diverged when this "
            "was saved, go on from an earlier checkpoint"
        )


def prepare(run: Path, *, anew: bool) -> None:
    """Find out before training whether checkpoints can be written.

    Args:
        run: the folder of the checkpoints.
        anew: whether training does not go on from one. Then those that are there are warned of.

    Raises:
        OSError: they cannot be written.
    """
    _put_back(run)
    stage = run / UNFINISHED
    try:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        stage.rmdir()
    except OSError as error:
        raise OSError(
            error.errno, f"checkpoints cannot be written ({error.strerror})", str(run)
        ) from error
    found = last_checkpoint(run) if anew else None
    if found is not None:
        warnings.warn(
            f"{run} holds checkpoints of an earlier run, the last of them {found.name}, and "
            "training begins anew: resume_from_checkpoint=True goes on from it instead; remove "
            "them, or a later resumption may take one of theirs for one of this run's",
            stacklevel=3,
        )


def remove_checkpoints(folder: str | os.PathLike[str]) -> None:
    """Remove every checkpoint in a folder, and what is left of unfinished ones."""
    for _, checkpoint in _numbered(Path(folder)):
        _remove(checkpoint)
    shutil.rmtree(Path(folder) / UNFINISHED, ignore_errors=True)


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints, as Trainer does, each in one step.

    Args:
        run: their folder.
        limit: how many may stay; None or 0 for all of them.
        best: one that stays, as the newest does.
    """
    if not limit or limit < 0:
        return
    found = sorted(_numbered(run), key=lambda one: (one[1].stat().st_mtime, one[0]))
    names = [checkpoint.name for _, checkpoint in found]
    kept = {*names[-1:], *([Path(best).name] if best else [])} & {*names}
    surplus = max(0, len(names) - max(limit, len(kept)))
    for name in [one for one in names if one not in kept][:surplus]:
        _remove(run / name)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    return [
        (int(path.name.removeprefix(prefix)), path)
        for path in folder.glob(f"{prefix}*")
        if path.name.removeprefix(prefix).isdecimal() and path.is_dir()
    ]


def _remove(checkpoint: Path) -> None:
    """Take the name first: a kill in the middle leaves no half checkpoint under it."""
    stage = checkpoint.parent / UNFINISHED
    stage.mkdir(exist_ok=True)
    os.rename(checkpoint, stage / f"removed-{checkpoint.name}")  # noqa: PTH104
    shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def written_whole(
    run: Path, name: str, *, writes: bool, wait: Callable[[], None]
) -> Iterator[Path]:
    """Inside, ``<the folder that is given>/<name>`` is written, by all ranks; behind, it is
    ``run/name``.

    Args:
        run: the folder of the checkpoints.
        name: of this one; another of that name is replaced.
        writes: whether this process names the folder; of those that share one, one does.
        wait: for all of them.

    Raises:
        OSError: it could not be written. Nothing of it is left, and the checkpoints that there
            were are as they were.
    """
    stage = run / UNFINISHED
    try:
        if writes:
            _put_back(run)
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True)
        wait()
        yield stage
        wait()
        if writes:
            _flush(stage / name)
            _rename(stage, run, name)
        wait()
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = error if isinstance(error, OSError) else _fault_of_the_disk(stage)
        if reason is None:
            raise
        if writes:
            shutil.rmtree(stage, ignore_errors=True)
        raise OSError(
            reason.errno,
            f"{name} could not be written ({reason.strerror}); the checkpoints that were there are "
            "whole, and training can be resumed from the last of them",
            str(run),
        ) from error


def _fault_of_the_disk(folder: Path) -> OSError | None:
    """What torch and safetensors do not say: why a file could not be written; None if it was not
    the disk, or there is no such folder, as on another machine than the one that writes."""
    if not folder.is_dir():
        return None
    try:
        write_whole(folder / "probe", bytes(_ROOM))
    except OSError as fault:
        return fault
    (folder / "probe").unlink()
    return None


def _rename(stage: Path, run: Path, name: str) -> None:
    old = stage / f"{_REPLACED}{name}"
    if (run / name).exists():
        os.rename(run / name, old)  # noqa: PTH104
    os.rename(stage / name, run / name)  # noqa: PTH104
    flush_folder(run)
    shutil.rmtree(stage, ignore_errors=True)


def _put_back(run: Path) -> None:
    """Undo the first of the two renames that replace a checkpoint, if a kill came between."""
    for old in (run / UNFINISHED).glob(f"{_REPLACED}*"):
        if not (run / old.name.removeprefix(_REPLACED)).exists():
            with suppress(FileNotFoundError):  # another rank was faster
                os.rename(old, run / old.name.removeprefix(_REPLACED))  # noqa: PTH104


def _flush(folder: Path) -> None:
    """Let files and folders reach the disk before the name does."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            flush_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _is_whole(checkpoint: Path) -> bool:
    try:
        parse_json(read_text(checkpoint / TRAINER_STATE_NAME))
    except (OSError, ValueError):
        return False
    return True
