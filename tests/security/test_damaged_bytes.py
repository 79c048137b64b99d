"""An adapter file that is truncated or changed at every byte."""

from __future__ import annotations

import struct

import pytest
import torch
from payloads import put
from tiny_models import llama
from witnesses import assert_same, nothing_happens, state_of

from reft import ReftConfig, ReftModel
from reft.interop.folders import read_reft
from reft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter

CONFIG = ReftConfig(rank=1, layers=[0], positions="l1")
TENSORS = {
    "rotation": torch.eye(2)[:1].view(1, 1, 1, 2),
    "weight": torch.ones(1, 1, 1, 2),
    "bias": torch.ones(1, 1, 1),
}


def test_every_prefix_is_refused(tmp_path):
    """Truncate at every length, read, and load the last one on a model."""
    path = put(tmp_path / "a", CONFIG, TENSORS)
    content = (path / WEIGHTS_FILE).read_bytes()
    for length in range(len(content)):
        (path / WEIGHTS_FILE).write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            read_adapter(path)
    model = ReftModel(llama())
    before = state_of(model)
    for load in (model.load_adapter, lambda p, n: model.pool.add(n, p)):
        with nothing_happens(), pytest.raises(ValueError, match="truncated"):
            load(path, "new")
    assert_same(before, state_of(model))
    (path / WEIGHTS_FILE).write_bytes(content)
    assert read_adapter(path)[0] == CONFIG


def test_every_byte_flipped(tmp_path):
    """Each file is refused, or read with finite numbers and a checked configuration."""
    path = put(tmp_path / "a", CONFIG, TENSORS)
    (path / CONFIG_FILE).unlink()
    content = (path / WEIGHTS_FILE).read_bytes()
    body = 8 + struct.unpack("<Q", content[:8])[0]
    random = torch.Generator().manual_seed(0)
    flips = torch.randint(1, 256, (len(content),), generator=random).tolist()
    kept = {"header": 0, "numbers": 0}
    for at, other in enumerate(flips):
        for flip in {other, 1, 0x80}:
            broken = bytearray(content)
            broken[at] ^= flip
            (path / WEIGHTS_FILE).write_bytes(broken)
            try:
                adapter = read_reft(path)
            except (ValueError, FileNotFoundError):  # the second: a header without our key
                continue
            kept["header" if at < body else "numbers"] += 1
            assert all(tensor.isfinite().all() for tensor in adapter.tensors.values())
            assert ReftConfig.from_json(adapter.config.to_json()) == adapter.config
    # A changed number is still a number; "rank" with another letter is an unknown field.
    assert kept["numbers"] > 10 and kept["header"] < len(content)
