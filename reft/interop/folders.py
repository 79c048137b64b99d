"""Detection of the library that wrote an adapter folder, and conversion between formats."""

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
    """Detect the library that wrote a folder: "reft", "pyreft" or "adapters".

    Raises:
        OSError: the folder does not exist, or none of these libraries wrote it.
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
            errno.ENOENT,
            "a PEFT adapter changes weights and cannot be converted to ReFT",
            str(folder),
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
    """Read a reft adapter without a model, and without its training state."""
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
    """Write a reft adapter without a model."""
    heads = {MODULES_PREFIX + name: value for name, value in converted.heads.items()}
    write_adapter(path, converted.config, {**converted.tensors, **heads})


def write_pyreft_folder(path: str | os.PathLike[str], converted: Converted) -> None:
    """Write an adapter in pyreft's format without a model."""
    numbers = _numbers(converted.config, converted.tensors["rotation"])
    write_pyreft(path, converted.config, numbers, converted.tensors, converted.heads)


def _numbers(config: ReftConfig, rotation: Tensor) -> tuple[int, ...]:
    """Return the numbers of the edited blocks when no model is at hand."""
    if config.layers == "all":
        return tuple(range(rotation.shape[0]))
    numbers = tuple(int(layer) for layer in config.layers)
    if min(numbers) < 0:
        raise ValueError(
            "layers must not be negative, because the number of layers is unknown without the base "
            f"model; got {list(numbers)}. Use reft.save_pyreft"
        )
    return tuple(sorted(numbers))


#: Kind of folder -> its reader.
READERS: dict[str, Callable[..., Converted]] = {
    "reft": read_reft,
    "pyreft": read_pyreft,
    "adapters": read_adapters,
}

#: Kind of folder -> keywords of its reader for settings that its files do not hold.
READER_KEYWORDS: dict[str, frozenset[str]] = {
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

#: Kind of folder -> its writer.
WRITERS: dict[str, Callable[[str | os.PathLike[str], Converted], Any]] = {
    "reft": write_reft,
    "pyreft": write_pyreft_folder,
}
