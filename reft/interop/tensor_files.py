"""Files of tensors that other libraries wrote. A pickle is never executed."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a ``.safetensors`` or a ``torch.save`` file, by name, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds anything but named tensors, or is a pickle with code in it,
            which is not run.
    """
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
    # A saved nn.Parameter comes back as one.
    return {name: value.detach() for name, value in found.items()}
