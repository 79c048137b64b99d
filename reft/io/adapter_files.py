"""Adapter folders: ``adapter_model.safetensors`` and ``adapter_config.json``.

Each file is written under a temporary name, flushed to the disk and renamed, the weights first. The
header of the weights file holds the configuration too, so that file alone is a complete adapter:
after a crash, a reader finds the old adapter or the new one. The JSON file is for people and tools.
If the two files disagree after a crash between the renames, the header is used.

Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reft import peft_type
from reft.config import ReftConfig
from reft.io.atomic_write import write_whole
from reft.io.tensor_files import check_header
from reft.safe_read import parse_json, read_text, require_plain, shown

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

#: Key of the configuration in the header of the weights file.
METADATA_KEY = "reft_config"


def write_adapter(
    path: str | os.PathLike[str],
    config: ReftConfig,
    tensors: Mapping[str, Tensor],
    more: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write an adapter into a folder, replacing an existing adapter.

    Args:
        path: the folder; created with its parents if missing. Other files in it are kept.
        config: the configuration, stored with every field.
        tensors: any shapes and dtypes, on any device, views included. Copied, not modified.
        more: optional entries of the header.

    Raises:
        NotADirectoryError: ``path`` or a parent of it is a file.
        TypeError: a value in ``tensors`` is not a tensor.
        OSError: the folder cannot be written; the old adapter is unchanged.
    """
    folder = Path(path)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"tensors[{name!r}] must be a torch.Tensor, got {type(tensor).__name__}"
            )
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, "an adapter is stored in a directory, but this is a file", str(folder)
        )
    text = config.to_json()
    # safetensors refuses tensors that share storage, such as slices of a stacked parameter.
    copies = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    weights = save(copies, metadata={**more, "format": "pt", METADATA_KEY: text})
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / WEIGHTS_FILE, weights)
    write_whole(folder / CONFIG_FILE, _for_tools(config))


def read_adapter(path: str | os.PathLike[str]) -> tuple[ReftConfig, dict[str, Tensor]]:
    """Read the adapter in a folder.

    Returns:
        The configuration, and the tensors on the CPU with the names, shapes and dtypes that they
        were written with.

    Raises:
        FileNotFoundError: no such folder, no weights file in it, or no configuration.
        NotADirectoryError: ``path`` is a file.
        ValueError: a file is truncated, damaged or not a plain file; the configuration has a newer
            format or a bad field.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(errno.ENOENT, "no such adapter directory", str(folder))
    if not folder.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, "an adapter is a directory, but this is a file", str(folder)
        )
    weights = folder / WEIGHTS_FILE
    require_plain(weights)
    if not weights.exists():
        raise FileNotFoundError(
            errno.ENOENT,
            f"not an adapter directory, it has no {WEIGHTS_FILE} (it has: {_listing(folder)})",
            str(folder),
        )
    check_header(weights)
    try:
        with safe_open(weights, framework="pt", device="cpu") as stored:
            header = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights} is truncated or not a safetensors file: {error}") from None
    return _config(folder, header.get(METADATA_KEY)), tensors


def _for_tools(config: ReftConfig) -> str:
    """Return the configuration as JSON text with an entry for PEFT, which reft ignores."""
    values = {peft_type.FIELD: peft_type.ENTRY, **config.to_dict()}
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_list(
    path: str | os.PathLike[str], key: str, what: str, is_entry: Callable[[Any], bool]
) -> list[Any] | None:
    """Read a JSON list from the header of an adapter's weights file; None if the key is missing.

    Args:
        path: a folder that :func:`read_adapter` has read.
        key: the key in the header.
        what: the entries in words, for the message.
        is_entry: whether a value is a valid entry.

    Raises:
        ValueError: the value is not a JSON list of valid entries.
    """
    with safe_open(Path(path) / WEIGHTS_FILE, framework="pt", device="cpu") as stored:
        text = (stored.metadata() or {}).get(key)
    if text is None:
        return None
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {key} must be a list in JSON: {error}") from None
    if not isinstance(values, list) or not all(map(is_entry, values)):
        raise ValueError(f"{path}: {key} must be a list of {what}, got {shown(values)}")
    return values


def _config(folder: Path, embedded: str | None) -> ReftConfig:
    """Return the configuration of the header, else of the JSON file. Warn if they disagree."""
    beside = folder / CONFIG_FILE
    inner = None if embedded is None else _parse(embedded, f"the header of {folder / WEIGHTS_FILE}")
    if not beside.exists():
        if inner is None:
            raise FileNotFoundError(
                errno.ENOENT, f"not an adapter directory, it has no {CONFIG_FILE}", str(folder)
            )
        return inner
    outer = _parse(read_text(beside), str(beside))
    if inner is None:
        return outer
    if inner != outer:
        ours, theirs = inner.to_dict(), outer.to_dict()
        differing = ", ".join(
            f"{name} = {shown(ours[name])} and {shown(theirs[name])}"
            for name in ours
            if ours[name] != theirs[name]
        )
        warnings.warn(
            f"{folder / WEIGHTS_FILE} and {beside} disagree ({differing}); the configuration "
            "in the weights file is used. A crash during saving can cause this; save again",
            stacklevel=3,
        )
    return inner


def _parse(text: str, source: str) -> ReftConfig:
    try:
        return ReftConfig.from_json(text)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:5] + ["…"] * (len(names) > 5)) or "nothing"
