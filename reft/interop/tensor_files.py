"""Files of tensors that other libraries wrote. A pickle is never executed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from reft.nn.published import FLOATS
from reft.untrusted import require_plain, shown

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
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from None
    except Exception as error:  # what a damaged pickle raises, nobody has listed
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{file} must hold tensors and nothing else; it is damaged or holds code, "
            f"which is not run ({first})"
        ) from None
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
