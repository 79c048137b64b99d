"""Launch settings as data: a pure function of shape, dtype and target, no autotuning at run time.

Two regimes by rank. Up to 8 the products are summed by fused multiply-adds over a [rows, rank,
chunk] tile in registers, exact in float32; above, the matrix units take over (they work on 16 at
least). Tile sizes are chosen so that no build spills on the targets of ``python -m benchmarks
compile`` (seen in its table). What ``python -m benchmarks sweep`` finds to be faster on a device
goes into ``measured.json`` under the name of that device, and has the last word there; the file is
empty until a device was measured.

Products of the matrix units are those of float32: three tf32 products on NVIDIA ("tf32x3"), float32
ones on AMD ("ieee"). A single tf32 product would not do, although a bfloat16 or float16 value is
exact in its 10 bits: Hopper truncates the float32 operand to them instead of rounding it.

No tile has 64 rows of its left operand: that is where Triton takes Hopper's ``wgmma`` with that
operand in registers, which triton before 3.7 (issue 9433) and ptxas before CUDA 13.3 (triton's pull
request 11781) may overwrite while it is being read.
``tests/kernels/devtools/test_compile_report.py`` reads the machine code.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

#: The table of what was measured: a list of entries, see :func:`measured`.
TABLE = Path(__file__).with_name("measured.json")
#: Up to so many rows in the largest group, launches are the cost; beyond, bandwidth.
FEW_ROWS = 2048

#: Ranks that a program of "columns" holds gradients of; more take several passes over the rows.
MOST_RANKS = 32

#: All the registers an NVIDIA thread can address. Unless told a limit, ptxas spills a few of 40 to
#: 130 registers to reach the next step of occupancy (seen on cuda:80 and cuda:100); told one, it
#: spills only beyond it. 255 registers leave room for one block of 8 warps.
_MAX_REGISTERS = 255
#: Programs that fill a large device, one a multiprocessor (H100: 132); and the most partial sums of
#: a parameter's gradient, which are written and read once more.
_MULTIPROCESSORS, _SPLITS = 132, 16
#: Partial sums a thread holds in registers.
_SUMS = 32


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """Constants of one kernel build.

    Attributes:
        rows: BLOCK_N, rows a program holds.
        rank: BLOCK_R, the rank padded to a power of two, for "columns" at most ``MOST_RANKS``.
        chunk: BLOCK_D, columns read at a time.
        dot: whether products go to the matrix units.
        precision: of their float32 products, in Triton's words.
        warps, stages: launch options.
        max_registers: limit of registers a thread; None (AMD) leaves it to the compiler.
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

    @property
    def launch_options(self) -> dict[str, int]:
        """What a launch takes beside the kernel's arguments, and ``triton.compile`` as options.

        Fused multiply-adds are asked for by name: they are Triton's default only up to 3.9.
        """
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


#: kernel -> settings that a sweep tries now, whatever the shape; see ``devtools.tuning``.
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
    """The settings of "rows" (forward, and codes in backward) or "columns" (all other gradients).

    Args:
        dim: D. rank: r. num_rows: n of the largest group.
        dtype: of hidden; float64 (the interpreter's) never uses the matrix units.
        target: "cuda:90", "hip:gfx942", …; "cpu" is the interpreter. AMD's matrix units have other
            precisions.
        device: the name of the device, see :func:`device_name`; what was measured on it is used
            there and nowhere else. Empty: the settings by rule.
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
    # Measured on long rows and many of them: fit for all.
    chunk = min(config.chunk, max(16, _power_of_two(dim)))
    splits = max(1, min(config.splits, num_rows // config.rows))
    return replace(config, chunk=chunk, splits=splits)


def key(kernel: str, rank: int, num_rows: int, dtype: torch.dtype, device: str) -> tuple[str, ...]:
    """What the table distinguishes: name of the device, kernel, bytes of an element, padded rank,
    few or many rows."""
    size = "few" if num_rows <= FEW_ROWS else "many"
    return device, kernel, str(dtype.itemsize), str(_power_of_two(rank)), size


@functools.cache
def measured(table: Path) -> Mapping[tuple[str, ...], Mapping[str, int]]:
    """key -> fields of :class:`KernelConfig` that were faster there than :func:`default`'s.

    ``table`` is a JSON list of objects: "key" (see :func:`key`), "settings", and for readers
    "case", "commit" and "ratio" (time with these settings by time without).
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
    """The settings by rule, where nothing was measured; arguments as of :func:`choose`."""
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
    if kernel == "columns":
        # Enough programs to fill a device where columns do not, none with less than two tiles.
        programs = groups * -(-dim // chunk)
        splits = max(1, min(_SPLITS, 2 * _MULTIPROCESSORS // programs, num_rows // (2 * rows)))
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
    """(rows, chunk, warps, stages) of fused multiply-adds: a thread owns a column of the chunk, all
    rows and ranks of it, so that nothing is exchanged but once at the end."""
    threads, stages = 256, 2 if hip else 3
    if kernel == "columns":
        # Of each row a thread holds h, v and two codes at once. Small tiles, so more in flight; but
        # AMD keeps what is in flight in registers.
        rows, stages = (4, 1) if hip else (max(4, min(16, 32 // block_r)), 4)
        threads = 128
    else:
        # Every program reads both matrices whole: as many rows as keep every multiprocessor busy,
        # and as rows × rank partial sums leave registers for.
        share = min(_power_of_two(max(1, groups * num_rows // _MULTIPROCESSORS)), 16)
        rows = max(1, min(share, _SUMS // block_r, _power_of_two(num_rows)))
    return rows, threads, threads // (64 if hip else 32), stages


def _dot_tile(
    kernel: str, block_r: int, num_rows: int, dtype: torch.dtype, hip: bool
) -> tuple[int, int, int, int]:
    """(rows, chunk, warps, stages) of the matrix units. Never 64 rows, see above."""
    if kernel == "columns":
        # Two gradients and two matrices of [rank, chunk] at once.
        return 16, 64, 4 if hip or block_r < 32 else 8, 2
    if num_rows > FEW_ROWS and block_r <= 64 and not hip:
        # Both matrices are read once a program: twice the rows, half of that traffic.
        return 32, 64 if block_r <= 16 and dtype is not torch.float32 else 32, 4, 3
    # Three products hold their operands twice. A wavefront is twice a warp already.
    chunk = 64 if block_r <= 128 else 32
    warps = 8 if block_r >= 64 and not hip else 4
    # Two chunks of this size outgrow the 64 KiB a block has on AMD, 100 KiB at rank 256.
    return 16, chunk, warps, 1 if block_r >= (128 if hip else 256) else 2


@functools.cache
def target_of(device: torch.device) -> str:
    """The target that a device is: "cuda:90" by compute capability, "hip:gfx942", or "cpu"."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        architecture = torch.cuda.get_device_properties(device).gcnArchName
        return f"hip:{architecture.split(':')[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}{minor}"


@functools.cache
def device_name(device: torch.device) -> str:
    """The name that its maker gave a device, "NVIDIA H100 80GB HBM3"; "cpu" for the interpreter.

    Launch settings are kept by it: two devices of one compute capability differ in bandwidth and
    cache.
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def padded_rank(kernel: str, rank: int) -> int:
    """Ranks that a program of a kernel holds, without the matrix units' least of 16."""
    padded = _power_of_two(rank)
    return min(padded, MOST_RANKS) if kernel == "columns" else padded


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
