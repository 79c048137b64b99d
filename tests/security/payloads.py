"""Hostile files for the readers: damaged, of another kind, or with code."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import torch
from safetensors.torch import save

from reft.config import ReftConfig
from reft.io.adapter_files import CONFIG_FILE, METADATA_KEY, WEIGHTS_FILE


class Harmful:
    """An object whose pickle creates a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, (os.environ["REFT_TEST_TRACE"],)


def put(folder: Path, config: ReftConfig | dict | str, tensors: dict[str, torch.Tensor]) -> Path:
    """Write an adapter folder with any configuration, checked or not."""
    if isinstance(config, ReftConfig):
        config = config.to_json()
    text = config if isinstance(config, str) else json.dumps(config)
    folder.mkdir(parents=True, exist_ok=True)
    content = save(tensors, metadata={"format": "pt", METADATA_KEY: text})
    (folder / WEIGHTS_FILE).write_bytes(content)
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    return folder


def with_header(header: object, body: bytes = b"") -> bytes:
    """Make a safetensors file with any header, a value or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict:
    """Make the entry of a tensor in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
