"""Files that an adapter's reader may meet: damaged, of another kind, or with code in them."""

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
    """Pickled, a call that leaves a folder behind."""

    def __reduce__(self):
        return os.mkdir, (os.environ["REFT_TEST_TRACE"],)


def put(folder: Path, config: ReftConfig | dict | str, tensors: dict[str, torch.Tensor]) -> Path:
    """An adapter's folder with any configuration, checked or not."""
    if isinstance(config, ReftConfig):
        config = config.to_json()
    text = config if isinstance(config, str) else json.dumps(config)
    folder.mkdir(parents=True, exist_ok=True)
    content = save(tensors, metadata={"format": "pt", METADATA_KEY: text})
    (folder / WEIGHTS_FILE).write_bytes(content)
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    return folder


def with_header(header: object, body: bytes = b"") -> bytes:
    """A safetensors file around a header, which may be any value or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict:
    """A tensor in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
