"""Launch settings as data: a pure function of shape, dtype and target, no autotuning at run time.

There are two sets of settings: "rows" for ``edit_rows`` and ``edit_rows_grad``, "params" for
``edit_params_grad``. Both have two regimes by rank. Up to rank 8 the products are summed by fused
multiply-adds over a [rows, rank, chunk] tile in registers, exact in float32. Above, the matrix
units are used, which need at least 16 ranks. Tile sizes are chosen so that no build spills on the
targets of ``python -m benchmarks compile``, whose table shows it. Faster settings found by
``python -m benchmarks sweep`` go into ``measured.json`` under the name of the device, and override
the rules there. The file is empty until a device has been measured.

Products on the matrix units have float32 precision: three tf32 products on NVIDIA ("tf32x3"),
float32 products on AMD ("ieee"). A single tf32 product is not enough, although a bfloat16 or
float16 value fits its 10 bits: Hopper truncates the float32 operand to them instead of rounding it.

No tile has 64 rows of its left operand. There Triton uses Hopper's ``wgmma`` with that operand in
registers. Triton before 3.7 (issue 9433) and ptxas before CUDA 13.3 (triton's pull request 11781)
may overwrite such an operand too early. ``tests/kernels/devtools/test_compile_report.py`` reads the
machine code.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

#: The table of measured settings: a list of entries, see :func:`measured`.
TABLE = Path(__file__).with_name("measured.json")
#: Up to this number of rows in the largest group, launches are the cost; beyond, bandwidth.
FEW_ROWS = 2048

#: Largest number of ranks whose gradients a program of ``edit_params_grad`` holds; more ranks take
#: several passes over the rows.
MAX_RANKS_PER_PASS = 32

#: All the registers an NVIDIA thread can address. Without a limit, ptxas spills a few of 40 to 130
#: registers to reach the next step of occupancy (seen on cuda:80 and cuda:100); with a limit, it
#: spills only beyond it. 255 registers leave room for one block of 8 warps.
_MAX_REGISTERS = 255
#: Number of programs that fill a large device, one per multiprocessor (H100: 132).
_MULTIPROCESSORS = 132
#: Largest number of partial sums of a parameter's gradient; each is written and read once more.
_MAX_SPLITS = 16
#: Number of partial sums that a thread holds in registers.
_SUMS = 32


@dataclass(frozen=True)
class KernelConfig:
    """Constants of one kernel build.

    Attributes:
        rows: BLOCK_N, rows a program holds.
        rank: BLOCK_R, the rank padded to a power of two; for "params" at most
            ``MAX_RANKS_PER_PASS``.
        chunk: BLOCK_D, the columns that one iteration reads.
        dot: whether the matrix units compute the products.
        precision: Triton's name for the precision of their float32 products.
        warps, stages: launch options.
        max_registers: limit of registers per thread; None (AMD) leaves it to the compiler.
        splits: programs that share the row loop of a parameter's gradient.
    """

    rows: int
    rank: int
    chunk: int
    dot: bool
    precision: str
    warps: int = 4
    stages: int = 2
    max_registers: int | None = None
    splits: int = 1

    @functools.cached_property
    def launch_options(self) -> dict[str, int]:
        """The launch options, apart from the kernel's arguments; ``triton.compile`` takes them too.

        Fused multiply-adds are requested by name: they are Triton's default only up to 3.9.
        """
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """The compile-time arguments that settings determine, with the launch options."""
        return {
            "BLOCK_N": self.rows,
            "BLOCK_R": self.rank,
            "BLOCK_D": self.chunk,
            "DOT": self.dot,
            "PRECISION": self.precision,
            "STAGES": self.stages,
            **self.launch_options,
        }


#: kernel -> settings that a sweep is trying, for every shape; see ``devtools.tuning``.
TRIALS: dict[str, KernelConfig] = {}


def choose(
    kernel: str,
    *,
    dim: int,
    rank: int,
    num_rows: int,
    dtype: torch.dtype,
    target: str,
    device: str = "",
    groups: int = 1,
) -> KernelConfig:
    """Choose the settings "rows" (``edit_rows``, ``edit_rows_grad``) or "params"
    (``edit_params_grad``).

    Args:
        dim: D.
        rank: r.
        num_rows: n of the largest group.
        dtype: dtype of hidden; float64, which only the interpreter has, never uses the matrix
            units.
        target: "cuda:90", "hip:gfx942", …; "cpu" is the interpreter. AMD's matrix units have other
            precisions.
        device: name of the device, see :func:`device_name`; settings measured on it are used there
            only. Empty: the settings by rule.
        groups: g.
    """
    trial = TRIALS.get(kernel)
    return trial or _settings(kernel, dim, rank, num_rows, dtype, target, device, groups)


@functools.lru_cache(maxsize=4096)
def _settings(
    kernel: str,
    dim: int,
    rank: int,
    num_rows: int,
    dtype: torch.dtype,
    target: str,
    device: str,
    groups: int,
) -> KernelConfig:
    config = default(kernel, dim, rank, num_rows, dtype, target, groups)
    config = replace(config, **measured(TABLE).get(key(kernel, rank, num_rows, dtype, device), {}))
    # Settings measured on many long rows are reduced to fit fewer and shorter ones.
    chunk = min(config.chunk, max(16, _power_of_two(dim)))
    splits = max(1, min(config.splits, num_rows // config.rows))
    return replace(config, chunk=chunk, splits=splits)


def key(kernel: str, rank: int, num_rows: int, dtype: torch.dtype, device: str) -> tuple[str, ...]:
    """Return the table's key: name of the device, kernel, bytes of an element, padded rank, few or
    many rows."""
    size = "few" if num_rows <= FEW_ROWS else "many"
    return device, kernel, str(dtype.itemsize), str(_power_of_two(rank)), size


@functools.cache
def measured(table: Path) -> Mapping[tuple[str, ...], Mapping[str, int]]:
    """Read key -> fields of :class:`KernelConfig` that were faster than those of :func:`default`.

    ``table`` is a JSON list of objects with "key" (see :func:`key`) and "settings". Its fields
    "case", "commit" and "ratio" (time with these settings over time without) inform the reader.
    """
    entries = json.loads(table.read_text(encoding="utf-8"))
    return {tuple(entry["key"]): entry["settings"] for entry in entries}


def default(
    kernel: str,
    dim: int,
    rank: int,
    num_rows: int,
    dtype: torch.dtype,
    target: str,
    groups: int = 1,
) -> KernelConfig:
    """Compute the settings by rule, for shapes without measurements; see :func:`choose`."""
    hip = target.startswith("hip")
    block_r = padded_rank(kernel, rank)
    dot = dtype is not torch.float64 and (
        block_r > 8 or (num_rows > FEW_ROWS and dtype is not torch.float32)
    )
    block_r = max(block_r, 16) if dot else block_r
    if dot:
        rows, chunk, warps, stages = _dot_tile(kernel, block_r, num_rows, dtype, hip)
    else:
        rows, chunk, warps, stages = _fma_tile(kernel, block_r, num_rows, groups, hip)
    chunk = min(chunk, max(16, _power_of_two(dim)))
    splits = 1
    if kernel == "params":
        # Split the rows if the columns do not fill a device, with at least two tiles a split.
        programs = groups * -(-dim // chunk)
        splits = max(1, min(_MAX_SPLITS, 2 * _MULTIPROCESSORS // programs, num_rows // (2 * rows)))
    return KernelConfig(
        rows,
        block_r,
        chunk,
        dot,
        "ieee" if hip else "tf32x3",
        warps,
        stages,
        max_registers=None if hip else _MAX_REGISTERS,
        splits=splits,
    )


def _fma_tile(
    kernel: str, block_r: int, num_rows: int, groups: int, hip: bool
) -> tuple[int, int, int, int]:
    """Return (rows, chunk, warps, stages) for fused multiply-adds.

    A thread owns a column of the chunk with all its rows and ranks, so threads exchange data only
    once, at the end.
    """
    threads, stages = 256, 2 if hip else 3
    if kernel == "params":
        # A thread holds h, v and two coefficients of each row. Tiles are small, so more of them are
        # in flight; but AMD keeps data in flight in registers.
        rows, stages = (4, 1) if hip else (max(4, min(16, 32 // block_r)), 4)
        threads = 128
    else:
        # Every program reads both matrices completely. So it takes as many rows as keep every
        # multiprocessor busy and as its registers can hold rows × rank partial sums of.
        share = min(_power_of_two(max(1, groups * num_rows // _MULTIPROCESSORS)), 16)
        rows = max(1, min(share, _SUMS // block_r, _power_of_two(num_rows)))
    return rows, threads, threads // (64 if hip else 32), stages


def _dot_tile(
    kernel: str, block_r: int, num_rows: int, dtype: torch.dtype, hip: bool
) -> tuple[int, int, int, int]:
    """Return (rows, chunk, warps, stages) for the matrix units. Never 64 rows, see above."""
    if kernel == "params":
        # A program holds two gradients and two matrices of [rank, chunk].
        return 16, 64, 4 if hip or block_r < 32 else 8, 2
    if num_rows > FEW_ROWS and block_r <= 64 and not hip:
        # Each program reads both matrices: twice the rows, half of that traffic.
        return 32, 64 if block_r <= 16 and dtype is not torch.float32 else 32, 4, 3
    # Three products hold their operands twice. A wavefront has the threads of two warps.
    chunk = 64 if block_r <= 128 else 32
    warps = 8 if block_r >= 64 and not hip else 4
    # Two chunks of this size exceed the 64 KiB of a block on AMD, and 100 KiB at rank 256.
    return 16, chunk, warps, 1 if block_r >= (128 if hip else 256) else 2


@functools.cache
def target_of(device: torch.device) -> str:
    """Return the target of a device: "cuda:90" by compute capability, "hip:gfx942", or "cpu"."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        architecture = torch.cuda.get_device_properties(device).gcnArchName
        return f"hip:{architecture.split(':')[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}{minor}"


@functools.cache
def device_name(device: torch.device) -> str:
    """Return the vendor's name of a device, "NVIDIA H100 80GB HBM3"; "cpu" for the interpreter.

    Measured settings are stored by this name: two devices of one compute capability differ in
    bandwidth and cache.
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def padded_rank(kernel: str, rank: int) -> int:
    """Return the ranks that a program holds, without the matrix units' minimum of 16."""
    padded = _power_of_two(rank)
    return min(padded, MAX_RANKS_PER_PASS) if kernel == "params" else padded


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
