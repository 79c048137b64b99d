"""Launch settings other than the table's: what could be tried, and how to try it.

For ``python -m benchmarks sweep``; an edit in production never looks for settings. Two sets of
settings exist for every shape: "rows" (the forward kernel, and the codes in backward) and "columns"
(all other gradients).
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

KERNELS = ("rows", "columns")
#: Shared memory that the pipelined chunks of a candidate may take, in bytes.
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
    """Settings worth trying for a shape, those of the table first; arguments as of ``choose``.

    Other splits of the row loop and other pipelines, then tiles for fused multiply-adds up to rank
    8 and tiles for the matrix units. Whether they compile is for the device to say.
    """
    table = configs.choose(
        kernel, dim=dim, rank=rank, num_rows=num_rows, dtype=dtype, target=target, device=device
    )
    widest = max(16, 1 << (dim - 1).bit_length())
    found = [table, *(replace(table, splits=splits) for splits in _other_splits(kernel, table))]
    found += [replace(table, stages=stages) for stages in (1, 2, 4)]
    for tile in itertools.chain(_fma_tiles(kernel, rank), _dot_tiles(kernel, rank, dtype)):
        if tile["chunk"] <= widest:
            found.append(replace(table, **tile))
    return list(dict.fromkeys(found))


def _fma_tiles(kernel: str, rank: int) -> Iterator[dict[str, Any]]:
    """A thread owns one or two columns of the chunk, and at most 64 partial sums."""
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
    """No tile of 64 rows: see ``configs``."""
    padded = max(16, configs.padded_rank(kernel, rank))
    if dtype is torch.float64:
        return
    for rows, chunk, warps in itertools.product((16, 32), (32, 64, 128), (4, 8)):
        # A chunk of rows, and one of the parameter in float32, for each stage.
        stage = chunk * (rows * dtype.itemsize + padded * 4)
        yield {
            "rows": rows, "rank": padded, "chunk": chunk, "dot": True, "warps": warps,
            "stages": max(1, min(3, _SHARED // stage)),
        }  # fmt: skip


def _other_splits(kernel: str, config: KernelConfig) -> list[int]:
    if kernel != "columns":
        return []
    return [s for s in (config.splits // 2, config.splits * 2, config.splits * 4) if 1 <= s <= 64]


def label(config: KernelConfig) -> str:
    """The settings in a few words: ``4x8x128 fma w4 s2`` is rows × rank × chunk, warps, stages."""
    unit = "dot" if config.dot else "fma"
    splits = f" /{config.splits}" if config.splits > 1 else ""
    tile = f"{config.rows}x{config.rank}x{config.chunk}"
    return f"{tile} {unit} w{config.warps} s{config.stages}{splits}"


@contextmanager
def trial(kernel: str, config: KernelConfig) -> Iterator[None]:
    """Within the block every edit of this process that Triton computes takes ``config``, whatever
    its shape: not for several threads."""
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
    """An entry of the table that makes ``config`` the choice for shapes like this one on a device.

    Args:
        device: its name, see ``device_name``.
        measured: what a reader wants to know: case, commit, ratio.
    """
    plain = configs.default(kernel, dim, rank, num_rows, dtype, target)
    fields = asdict(plain)
    changed = {name: value for name, value in asdict(config).items() if value != fields[name]}
    key = configs.key(kernel, rank, num_rows, dtype, device)
    return {"key": list(key), "settings": changed, **measured}


def updated_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The text of ``measured.json`` with these entries in it, sorted by key; an entry replaces one
    of the same key."""
    kept = {tuple(one["key"]): one for one in json.loads(configs.TABLE.read_text(encoding="utf-8"))}
    kept |= {tuple(one["key"]): one for one in entries}
    lines = ",\n".join(json.dumps(dict(kept[key])) for key in sorted(kept))
    return f"[\n{lines}\n]\n" if kept else "[]\n"
