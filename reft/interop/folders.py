"""Which library wrote a folder, and folders of one made into folders of another."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from reft.adapter.tensor_checks import MODULES_PREFIX, TRAINING_STATE
from reft.config import ReftConfig
from reft.interop.from_adapters import read_adapters, stored_config
from reft.interop.from_pyreft import find_pyreft, read_pyreft
from reft.interop.to_pyreft import write_pyreft
from reft.interop.units import Converted
from reft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter, write_adapter
from reft.peft_type import is_of_peft
from reft.safe_read import parse_json, read_text


def kind_of(path: str | os.PathLike[str]) -> str:
    """The library that wrote a folder: "reft", "pyreft" or "adapters".

    Raises:
        OSError: there is no such folder, or none of them wrote it.
    """
    folder = Path(path)
    if not folder.is_dir():
        problem = "this is a file, not an adapter folder" if folder.exists() else "no such folder"
        raise FileNotFoundError(errno.ENOENT, problem, str(folder))
    if stored_config(folder) is not None:
        return "adapters"
    if find_pyreft(folder) is not None:
        return "pyreft"
    if _is_peft(folder):
        raise FileNotFoundError(
            errno.ENOENT, "an adapter of PEFT changes weights, it cannot become ReFT", str(folder)
        )
    if (folder / WEIGHTS_FILE).is_file():
        return "reft"
    raise FileNotFoundError(
        errno.ENOENT,
        f"no adapter of reft ({WEIGHTS_FILE}), pyreft (intkey_*.bin) or adapters ({CONFIG_FILE}) "
        "in this folder",
        str(folder),
    )


def _is_peft(folder: Path) -> bool:
    try:
        stored = parse_json(read_text(folder / CONFIG_FILE))
    except (OSError, ValueError):
        return False
    return isinstance(stored, dict) and is_of_peft(stored)


def read_reft(path: str | os.PathLike[str]) -> Converted:
    """Read an adapter of this library without a model; what a training run needs is left out."""
    config, tensors = read_adapter(path)
    heads, edit = {}, {}
    for name, value in tensors.items():
        if name.startswith(MODULES_PREFIX):
            heads[name.removeprefix(MODULES_PREFIX)] = value
        elif name not in TRAINING_STATE:
            edit[name] = value
    try:
        return Converted(config, edit, heads)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def write_reft(path: str | os.PathLike[str], converted: Converted) -> None:
    """Write an adapter of this library without a model."""
    heads = {MODULES_PREFIX + name: value for name, value in converted.heads.items()}
    write_adapter(path, converted.config, {**converted.tensors, **heads})


def write_pyreft_folder(path: str | os.PathLike[str], converted: Converted) -> None:
    """Write an adapter as pyreft does, without a model."""
    numbers = _numbers(converted.config, converted.tensors["rotation"])
    write_pyreft(path, converted.config, numbers, converted.tensors, converted.heads)


def _numbers(config: ReftConfig, rotation: Tensor) -> tuple[int, ...]:
    """The numbers of the blocks, of a model that is not here."""
    if config.layers == "all":
        return tuple(range(rotation.shape[0]))
    numbers = tuple(int(one) for one in config.layers)
    if min(numbers) < 0:
        raise ValueError(
            "layers must not be negative without the base model, which tells how many there are; "
            f"got {list(numbers)}. Use reft.save_pyreft"
        )
    return tuple(sorted(numbers))


#: kind -> how it is read.
READERS: dict[str, Callable[..., Converted]] = {
    "reft": read_reft,
    "pyreft": read_pyreft,
    "adapters": read_adapters,
}

#: kind -> the keywords of its reader, which are what its files do not say.
UNSAID: dict[str, frozenset[str]] = {
    "reft": frozenset(),
    "pyreft": frozenset(
        {
            "positions",
            "intervention",
            "activation",
            "dropout",
            "dropout_on",
            "short_prompts",
            "prompt_end",
            "block_path",
            "head",
        }
    ),
    "adapters": frozenset(
        {
            "positions",
            "intervention",
            "dropout",
            "dropout_on",
            "short_prompts",
            "prompt_end",
            "block_path",
            "head",
        }
    ),
}

#: kind -> how it is written.
WRITERS: dict[str, Callable[[str | os.PathLike[str], Converted], Any]] = {
    "reft": write_reft,
    "pyreft": write_pyreft_folder,
}
