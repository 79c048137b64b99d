"""An adapter on disk: two files, ``adapter_model.safetensors`` and ``adapter_config.json``.

Both are written beside their final names, flushed to the disk and renamed, the weights first. The
weights file carries the configuration in its own header, so it is a whole adapter by itself:
whatever moment a crash picks, a reader finds the old adapter or the new one, never half of one. The
JSON file is for people and for tools. If the two disagree, which a crash between the renames can
leave behind, the header is believed.

Nothing is ever pickled.
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

#: Where the header of the weights file keeps the configuration.
METADATA_KEY = "reft_config"


def write_adapter(
    path: str | os.PathLike[str],
    config: ReftConfig,
    tensors: Mapping[str, Tensor],
    more: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write an adapter into a directory, replacing the one that is there.

    Args:
        path: the directory; made, with its parents, if missing. Other files in it are left alone.
        config: stored with every field.
        tensors: any shapes and dtypes, on any device, views too. Copied, not modified.
        more: entries of the header that a reader may pass by.

    Raises:
        NotADirectoryError: ``path``, or a parent of it, is a file.
        TypeError: a value in ``tensors`` is not a tensor.
        OSError: the directory cannot be written; the old adapter is still there.
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
    # safetensors refuses tensors that share storage, which slices of one stacked parameter do.
    copies = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    weights = save(copies, metadata={**more, "format": "pt", METADATA_KEY: text})
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / WEIGHTS_FILE, weights)
    write_whole(folder / CONFIG_FILE, _for_tools(config))


def read_adapter(path: str | os.PathLike[str]) -> tuple[ReftConfig, dict[str, Tensor]]:
    """Read the adapter in a directory.

    Returns:
        The configuration, and the tensors on the CPU with the names, shapes and dtypes they were
        written with.

    Raises:
        FileNotFoundError: no such directory, or no weights in it, or no configuration anywhere.
        NotADirectoryError: ``path`` is a file.
        ValueError: a truncated or damaged file, a pipe in the place of one, a configuration of a
            newer format or a bad field.
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
    """The configuration with an entry for PEFT, which its own reader passes over."""
    values = {peft_type.FIELD: peft_type.ENTRY, **config.to_dict()}
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_list(
    path: str | os.PathLike[str], key: str, what: str, is_entry: Callable[[Any], bool]
) -> list[Any] | None:
    """A list that the header of an adapter's weights file holds in JSON; None if it holds none.

    Args:
        path: a folder that :func:`read_adapter` has read.
        key: of the header.
        what: its entries, in words, for the message.
        is_entry: whether a value is one of them.

    Raises:
        ValueError: something else stands in its place.
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
    """The configuration in the header, else that of the JSON file; a disagreement is a warning."""
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
            f"{folder / WEIGHTS_FILE} and {beside} disagree ({differing}); the weights file is "
            "believed. A crash while saving leaves this behind; saving again mends it",
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
