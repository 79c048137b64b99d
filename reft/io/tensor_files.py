"""Tensor files that other libraries wrote. No code in a pickle is executed."""

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

#: Bytes of a safetensors header; enough to name a hundred thousand tensors.
_LARGEST_HEADER = 2**24

#: Characters of a tensor name. Regular expressions are slow on longer names.
_LONGEST_NAME = 1000


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the named tensors of a ``.safetensors`` or ``torch.save`` file onto the CPU.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is damaged, holds anything but named tensors, or is a pickle with code, which
            is not run.
    """
    require_plain(file)
    if file.suffix == ".safetensors":
        check_header(file)
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a safetensors file: {error}") from None
    try:
        values = load_plain(file)
    except ValueError as error:
        raise ValueError(f"{file} must hold tensors and nothing else; it {error}") from None
    named = isinstance(values, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in values.items()
    )
    if not named:
        raise ValueError(f"{file} must hold tensors by name, got {type(values).__name__}")
    for name, value in values.items():
        if len(name) > _LONGEST_NAME:
            raise ValueError(
                f"{file} must name tensors in at most {_LONGEST_NAME} characters, got {shown(name)}"
            )
        if not _is_plain(value):
            raise ValueError(f"{file}: {name} must be a plain tensor that the file holds whole")
    # A saved nn.Parameter is loaded as a nn.Parameter.
    return {name: value.detach() for name, value in values.items()}


def load_plain(file: Path) -> Any:
    """Load a ``torch.save`` file onto the CPU without running code in it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged or holds code. The text follows the name of the file.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise any type
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"is damaged or holds code, which is not run ({shown(first)})") from None


def check_header(file: Path) -> None:
    """Check the header of a safetensors file before a reader parses it.

    Readers differ in which of two duplicate keys they keep. Other damage is left to the reader.

    Raises:
        OSError: the file cannot be read.
        ValueError: the header is too long, or has a duplicate key.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = stream.read(size) if size <= _LARGEST_HEADER else b""
    if size > _LARGEST_HEADER:
        raise ValueError(
            f"{file} is truncated or not a safetensors file: its header must have at most "
            f"{_LARGEST_HEADER} bytes, got {size}"
        )
    try:
        parse_json(header.decode())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return
    except ValueError as error:
        raise ValueError(f"the header of {file}: {error}") from None


def check_floats(source: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that all tensors have a floating-point data type.

    Raises:
        ValueError: a tensor has another data type; the message names it.
    """
    for name, value in tensors.items():
        if value.dtype not in FLOATS:
            listed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise ValueError(f"{source} must hold {name} as {listed}, got {value.dtype}")


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor is dense, on the CPU, and not larger than its storage.

    A few bytes of a pickle may describe a tensor on the meta device, or a number that is expanded
    a billion times.
    """
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_nested
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )
