"""Atomic checkpoints, and the search for the checkpoint to resume from.

Trainer writes a checkpoint file by file. Here it writes into a staging folder. When every rank is
done, the files are flushed to disk and the folder is renamed in one step. A kill, a power cut or a
full disk at any moment leaves ``checkpoint-N`` complete or absent.
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

#: The staging folder, in which a checkpoint is written, beside the finished ones.
UNFINISHED = ".unfinished"

#: Trainer's state files that are read when training is resumed.
_STATES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")

#: The prefix of a checkpoint in the staging folder that is being replaced.
_REPLACED = "replaced-"

#: The size of the file, in bytes, that is written to find out whether the disk is full.
_PROBE_SIZE = 1 << 20


def last_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest complete checkpoint in a folder, None if there is none.

    A checkpoint without ``trainer_state.json``, which Trainer writes last, or with a truncated one
    is skipped. Other libraries and earlier versions can leave such checkpoints.
    """
    _restore_replaced(Path(folder))
    complete = [item for item in _numbered(Path(folder)) if _is_complete(item[1])]
    return max(complete)[1] if complete else None


def require_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that is not a checkpoint of a training run.

    Raises:
        ValueError: the folder does not exist; or it has no state of Trainer's, as a published
            adapter.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"resume_from_checkpoint must be a folder, there is none at {path}")
    if (path / TRAINER_STATE_NAME).exists():
        return
    inside = last_checkpoint(path)
    hint = "" if inside is None else f". The last checkpoint in it is {inside}"
    if (path / CONFIG_FILE).exists() or (path / WEIGHTS_FILE).exists():
        raise ValueError(
            f"resume_from_checkpoint must be a checkpoint of a training run, {path} is an adapter "
            f"and no checkpoint (it has no {TRAINER_STATE_NAME}): to train it further, load it "
            f"with ReftModel.from_pretrained(base_model, {str(path)!r}, is_trainable=True) and "
            f"call train() without resume_from_checkpoint{hint}"
        )
    raise ValueError(
        f"resume_from_checkpoint must be a checkpoint of a training run, {path} is no checkpoint "
        f"(it has no {TRAINER_STATE_NAME}){hint}"
    )


def check_states(checkpoint: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint with unusable state files, before anything is restored.

    No pickled code runs: a file with code is refused. ``training_args.bin`` is not read.

    Raises:
        ValueError: a state file of the optimizer, scheduler, scaler or random numbers is damaged or
            holds code, NaN or infinity; or ``trainer_state.json`` is damaged.
    """
    folder = Path(checkpoint)
    state = folder / TRAINER_STATE_NAME
    if state.exists():
        text = read_text(state)
        try:
            is_object = isinstance(parse_json(text), dict)
        except ValueError as error:
            raise ValueError(f"{state}: {error}") from None
        if not is_object:
            raise ValueError(f"{state} must hold a JSON object")
    for name in _STATES:
        for file in sorted(folder.glob(name)):
            _check_finite(file, read_state(file))


def read_state(file: Path) -> Any:
    """Read a file of ``torch.save`` on the CPU, without running code in it.

    Raises:
        OSError: it does not exist or cannot be read.
        ValueError: it is damaged or holds code.
    """
    require_plain(file)
    try:
        with safe_globals():  # numpy's types, for the state of its random numbers
            return load_plain(file)
    except ValueError as error:
        raise ValueError(f"{file} {error}") from None


def _check_finite(file: Path, value: Any, name: str = "") -> None:
    if isinstance(value, dict):
        for key, element in value.items():
            _check_finite(file, element, f"{name}.{key}" if name else str(key))
    elif isinstance(value, torch.Tensor) and value.dtype in FLOATS and not value.isfinite().all():
        raise ValueError(
            f"{file} must be finite, {name} holds NaN or infinity: the run had diverged when this "
            "was saved, resume from an earlier checkpoint"
        )


def prepare(run: Path, *, is_new_run: bool) -> None:
    """Check before training that checkpoints can be written.

    Args:
        run: the folder of the checkpoints.
        is_new_run: whether the run does not resume from a checkpoint, in which case existing
            checkpoints cause a warning.

    Raises:
        OSError: they cannot be written.
    """
    _restore_replaced(run)
    stage = run / UNFINISHED
    try:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        stage.rmdir()
    except OSError as error:
        raise OSError(
            error.errno, f"checkpoints cannot be written ({error.strerror})", str(run)
        ) from error
    last = last_checkpoint(run) if is_new_run else None
    if last is not None:
        warnings.warn(
            f"{run} holds checkpoints of an earlier run, the last of them {last.name}, and "
            "training begins anew: resume_from_checkpoint=True continues from it instead; remove "
            "them, or resuming this run later may use one of them",
            stacklevel=3,
        )


def remove_checkpoints(folder: str | os.PathLike[str]) -> None:
    """Remove every checkpoint in a folder, finished or not."""
    for _, checkpoint in _numbered(Path(folder)):
        _remove(checkpoint)
    shutil.rmtree(Path(folder) / UNFINISHED, ignore_errors=True)


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints, as Trainer does, each in one step.

    Args:
        run: the folder of the checkpoints.
        limit: the maximum number of checkpoints; None or 0 for no maximum.
        best: a checkpoint that is never removed, like the newest.
    """
    if not limit or limit < 0:
        return
    by_age = sorted(_numbered(run), key=lambda item: (item[1].stat().st_mtime, item[0]))
    names = [checkpoint.name for _, checkpoint in by_age]
    protected = {*names[-1:], *([Path(best).name] if best else [])} & {*names}
    surplus = max(0, len(names) - max(limit, len(protected)))
    for name in [name for name in names if name not in protected][:surplus]:
        _remove(run / name)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of the checkpoints in a folder."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    return [
        (int(path.name.removeprefix(prefix)), path)
        for path in folder.glob(f"{prefix}*")
        if path.name.removeprefix(prefix).isdecimal() and path.is_dir()
    ]


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; rename it first, so that a kill leaves no partial one under its name."""
    stage = checkpoint.parent / UNFINISHED
    stage.mkdir(exist_ok=True)
    os.rename(checkpoint, stage / f"removed-{checkpoint.name}")  # noqa: PTH104
    shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def atomic_checkpoint(
    run: Path, name: str, *, writes: bool, wait: Callable[[], None]
) -> Iterator[Path]:
    """Yield the staging folder, in which all ranks write the folder ``name``; on exit it becomes
    ``run/name``.

    Args:
        run: the folder of the checkpoints.
        name: the checkpoint's name; an existing checkpoint of that name is replaced.
        writes: whether this process renames the folder, one process per shared file system.
        wait: a barrier over all ranks.

    Raises:
        OSError: it could not be written. Nothing of it is left, and earlier checkpoints are
            unchanged.
    """
    stage = run / UNFINISHED
    try:
        if writes:
            _restore_replaced(run)
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
        reason = error if isinstance(error, OSError) else _find_disk_error(stage)
        if reason is None:
            raise
        if writes:
            shutil.rmtree(stage, ignore_errors=True)
        raise OSError(
            reason.errno,
            f"{name} could not be written ({reason.strerror}); earlier checkpoints are complete, "
            "and training can be resumed from the last of them",
            str(run),
        ) from error


def _find_disk_error(folder: Path) -> OSError | None:
    """Return why a file could not be written, which errors of torch and safetensors do not contain.

    None if the disk was not the cause, or the folder is absent, as on a rank of another machine.
    """
    if not folder.is_dir():
        return None
    try:
        write_whole(folder / "probe", bytes(_PROBE_SIZE))
    except OSError as error:
        return error
    (folder / "probe").unlink()
    return None


def _rename(stage: Path, run: Path, name: str) -> None:
    old = stage / f"{_REPLACED}{name}"
    if (run / name).exists():
        os.rename(run / name, old)  # noqa: PTH104
    os.rename(stage / name, run / name)  # noqa: PTH104
    flush_folder(run)
    shutil.rmtree(stage, ignore_errors=True)


def _restore_replaced(run: Path) -> None:
    """Undo the first of the two renames that replace a checkpoint, if a kill came between them."""
    for old in (run / UNFINISHED).glob(f"{_REPLACED}*"):
        if not (run / old.name.removeprefix(_REPLACED)).exists():
            with suppress(FileNotFoundError):  # another rank was faster
                os.rename(old, run / old.name.removeprefix(_REPLACED))  # noqa: PTH104


def _flush(folder: Path) -> None:
    """Flush all files and folders to disk, so that the rename cannot reach the disk first."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            flush_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _is_complete(checkpoint: Path) -> bool:
    try:
        parse_json(read_text(checkpoint / TRAINER_STATE_NAME))
    except (OSError, ValueError):
        return False
    return True
