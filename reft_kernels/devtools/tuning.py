"""Candidates for launch settings, and how to try them.

``python -m benchmarks sweep`` uses them; an edit in production never searches for settings. Every
shape has two sets of settings: "rows" (``edit_rows``, ``edit_rows_grad``) and "params"
(``edit_params_grad``).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from reft_kernels._triton import configs
from reft_kernels._triton.configs import KernelConfig as KernelConfig
from reft_kernels._triton.configs import device_name as device_name
from reft_kernels._triton.configs import target_of as target_of

KERNELS = ("rows", "params")
#: Largest shared memory of the pipelined chunks of a candidate, in bytes.
_SHARED = 96 * 1024


def candidates(
    kernel: str,
    *,
    dim: int,
    rank: int,
    num_rows: int,
    dtype: torch.dtype,
    target: str,
    device: str = "",
) -> list[KernelConfig]:
    """List the settings to try for a shape, those of the table first; see ``configs.choose``.

    Other splits of the row loop and other pipelines come next. Then come tiles for fused
    multiply-adds, up to rank 8, and for the matrix units. Some may not compile on the device.
    """
    table = configs.choose(
        kernel, dim=dim, rank=rank, num_rows=num_rows, dtype=dtype, target=target, device=device
    )
    widest = max(16, 1 << (dim - 1).bit_length())
    settings = [table, *(replace(table, splits=splits) for splits in _other_splits(kernel, table))]
    settings += [replace(table, stages=stages) for stages in (1, 2, 4)]
    for tile in itertools.chain(_fma_tiles(kernel, rank), _dot_tiles(kernel, rank, dtype)):
        if tile["chunk"] <= widest:
            settings.append(replace(table, **tile))
    return list(dict.fromkeys(settings))


def _fma_tiles(kernel: str, rank: int) -> Iterator[dict[str, Any]]:
    """List tiles where a thread owns one or two columns of the chunk and up to 64 partial sums."""
    padded = configs.padded_rank(kernel, rank)
    if padded > 8:
        return
    for rows, warps, wide in itertools.product((1, 2, 4, 8, 16), (4, 8), (1, 2)):
        if 8 <= rows * padded * wide <= 64 or rows == 16:
            yield {
                "rows": rows, "rank": padded, "chunk": 32 * warps * wide, "dot": False,
                "warps": warps, "stages": 3,
            }  # fmt: skip


def _dot_tiles(kernel: str, rank: int, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """List tiles for the matrix units; none has 64 rows, see ``configs``."""
    padded = max(16, configs.padded_rank(kernel, rank))
    if dtype is torch.float64:
        return
    for rows, chunk, warps in itertools.product((16, 32), (32, 64, 128), (4, 8)):
        # Each stage holds a chunk of rows, and one of the parameter in float32.
        stage = chunk * (rows * dtype.itemsize + padded * 4)
        yield {
            "rows": rows, "rank": padded, "chunk": chunk, "dot": True, "warps": warps,
            "stages": max(1, min(3, _SHARED // stage)),
        }  # fmt: skip


def _other_splits(kernel: str, config: KernelConfig) -> list[int]:
    if kernel != "params":
        return []
    return [s for s in (config.splits // 2, config.splits * 2, config.splits * 4) if 1 <= s <= 64]


def label(config: KernelConfig) -> str:
    """Describe settings briefly: ``4x8x128 fma w4 s2`` is rows × rank × chunk, warps, stages."""
    unit = "dot" if config.dot else "fma"
    splits = f" /{config.splits}" if config.splits > 1 else ""
    tile = f"{config.rows}x{config.rank}x{config.chunk}"
    return f"{tile} {unit} w{config.warps} s{config.stages}{splits}"


@contextmanager
def trial(kernel: str, config: KernelConfig) -> Iterator[None]:
    """Use ``config`` for every Triton edit of this process within the block, whatever its shape.

    Not for several threads.
    """
    before = configs.TRIALS.get(kernel)
    configs.TRIALS[kernel] = config
    try:
        yield
    finally:
        if before is None:
            del configs.TRIALS[kernel]
        else:
            configs.TRIALS[kernel] = before


def entry(
    kernel: str,
    config: KernelConfig,
    *,
    dim: int,
    rank: int,
    num_rows: int,
    dtype: torch.dtype,
    target: str,
    device: str,
    **measured: Any,
) -> dict[str, Any]:
    """Make the table's entry that selects ``config`` for shapes like this one on a device.

    Args:
        device: its name, see ``device_name``.
        measured: fields for the reader: case, commit, ratio.
    """
    plain = configs.default(kernel, dim, rank, num_rows, dtype, target)
    fields = asdict(plain)
    changed = {name: value for name, value in asdict(config).items() if value != fields[name]}
    key = configs.key(kernel, rank, num_rows, dtype, device)
    return {"key": list(key), "settings": changed, **measured}


def updated_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of ``measured.json`` with these entries added, sorted by key.

    An entry replaces an existing one with the same key.
    """
    existing = json.loads(configs.TABLE.read_text(encoding="utf-8"))
    table = {tuple(item["key"]): item for item in (*existing, *entries)}
    lines = ",\n".join(json.dumps(dict(table[key])) for key in sorted(table))
    return f"[\n{lines}\n]\n" if table else "[]\n"
