"""Files of tensors that other libraries wrote. A pickle is never executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from reft.config import FLOATS
from reft.safe_read import parse_json, require_plain, shown

#: Bytes: the names of a hundred thousand tensors.
_LARGEST_HEADER = 2**24

#: No parameter has a longer name; patterns that look for parts of names are slow on long ones.
_LONGEST = 1000


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a ``.safetensors`` or a ``torch.save`` file, by name, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds anything but named tensors, or is a pickle with code in it,
            which is not run.
    """
    require_plain(file)
    if file.suffix == ".safetensors":
        check_header(file)
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a safetensors file: {error}") from None
    try:
        found = load_plain(file)
    except ValueError as error:
        raise ValueError(f"{file} must hold tensors and nothing else; it {error}") from None
    named = isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    )
    if not named:
        raise ValueError(f"{file} must hold tensors by name, got {type(found).__name__}")
    for name, value in found.items():
        if len(name) > _LONGEST:
            raise ValueError(
                f"{file} must name tensors in {_LONGEST} characters, got {shown(name)}"
            )
        if not _is_plain(value):
            raise ValueError(f"{file}: {name} must be a plain tensor that the file holds whole")
    # A saved nn.Parameter comes back as one.
    return {name: value.detach() for name, value in found.items()}


def load_plain(file: Path) -> Any:
    """What a file of ``torch.save`` holds, on the CPU; no code in it is run.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged or holds code; words to come behind what was read.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what a damaged pickle raises, nobody has listed
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"is damaged or holds code, which is not run ({shown(first)})") from None


def check_header(file: Path) -> None:
    """Refuse a safetensors file by its header, before that is read by others: an unreasonable
    length, or a name twice, of which readers take the first or the last.

    Raises:
        OSError: it cannot be read.
        ValueError: as above. Other damage is left to the reader to find.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = stream.read(size) if size <= _LARGEST_HEADER else b""
    if size > _LARGEST_HEADER:
        raise ValueError(
            f"{file} is truncated or not a safetensors file: its header would have {size} bytes, "
            f"allowed are {_LARGEST_HEADER}"
        )
    try:
        parse_json(header.decode())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return
    except ValueError as error:
        raise ValueError(f"the header of {file}: {error}") from None


def check_floats(source: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other than floating-point numbers.

    Raises:
        ValueError: one is, with its name.
    """
    for name, value in tensors.items():
        if value.dtype not in FLOATS:
            listed = ", ".join(str(one).removeprefix("torch.") for one in FLOATS)
            raise ValueError(f"{source} must hold {name} as {listed}, got {value.dtype}")


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor is dense, on the CPU, and not larger than what was read: a few bytes of a
    pickle may stand for a tensor on no device, or for one number a billion times."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_nested
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )
