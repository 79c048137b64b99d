"""Compile the kernels without a GPU and report the resources that they would occupy.

``triton.compile`` needs only a target's name. NVIDIA's cubin is read with Triton's own
``cuobjdump`` and ``nvdisasm``; AMD's assembly lists the resources.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from reft_kernels import _triton

_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
#: Numbers of rows of the largest group: f7+l7 times a batch of 32, and every row of 16 × 512.
ROWS = (448, 8192)
#: Backend, architecture and threads per warp of every target, by the name that users type.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "cuda:80": ("cuda", 80, 32),
    "cuda:90": ("cuda", 90, 32),
    "cuda:100": ("cuda", 100, 32),
    "hip:gfx942": ("hip", "gfx942", 64),
}
#: Integer arguments of the kernels at run time, in addition to strides of rows.
_INTEGERS = ("loop_end", "rank_end", "split_stride", "group_size")
KERNELS = ("edit_rows", "edit_rows_grad", "edit_params_grad")
VARIANTS = ("linear", "gelu")


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel build: everything that is compiled into it.

    Attributes:
        kernel: "edit_rows", "edit_rows_grad" or "edit_params_grad".
        variant: "linear" (the folded edit) or "gelu" (activation and subtraction, the largest).
        num_rows: n of the largest group, which the launch settings depend on.
    """

    kernel: str
    variant: str
    dim: int
    rank: int
    dtype: torch.dtype
    num_rows: int = ROWS[0]


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources that a build occupies.

    Attributes:
        registers: registers per thread (AMD: vector and accumulation registers).
        shared: bytes of shared memory per block.
        stack: bytes of local (AMD: scratch) memory per thread.
        spills: bytes of registers that a thread spills to local memory.
        scalar_spills: bytes of AMD's scalar registers that a wavefront spills to lanes of vector
            registers, without memory traffic; 0 on NVIDIA.
        register_wgmma: number of Hopper's wgmma instructions with their left operand in registers,
            which triton before 3.7 and ptxas before CUDA 13.3 may overwrite too early.
        dots: number of matrix products, ``tl.dot`` or made by Triton from sums of products.
    """

    registers: int
    shared: int
    stack: int
    spills: int
    scalar_spills: int = 0
    register_wgmma: int = 0
    dots: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def builds(
    dims: tuple[int, ...],
    ranks: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    num_rows: tuple[int, ...] = ROWS,
) -> Iterator[Build]:
    """List every build of a matrix of shapes: three kernels, two variants each."""
    for parts in itertools.product(KERNELS, VARIANTS, dims, ranks, dtypes, num_rows):
        yield Build(*parts)


def check_target(target: str) -> None:
    """Raise unless builds for ``target`` can be compiled in this process.

    Raises:
        ValueError: an unknown target.
        RuntimeError: Triton is not installed, or the kernels are interpreted (TRITON_INTERPRET=1).
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if _triton.interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 replaces the kernels by Python: unset it to compile")
    if find_spec("triton") is None:
        raise RuntimeError("triton is not installed")


def compile_build(build: Build, target: str) -> Resources:
    """Compile one build.

    Args:
        target: a name in ``TARGETS``.

    Raises:
        ValueError, RuntimeError: see ``check_target``.
    """
    check_target(target)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend = TARGETS[target][0]
    kernel, signature, constants, options = _source(build, target)
    names = kernel.arg_names
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind != "constexpr" and name not in ("group_size", "rank_end")  # of any size
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    if backend == "cuda":
        resources = _nvidia_resources(compiled.asm["cubin"], compiled.metadata.shared)
        resources = replace(resources, register_wgmma=register_wgmma(compiled.asm["ptx"]))
    else:
        resources = _amd_resources(compiled.asm["amdgcn"], compiled.metadata.shared)
    return replace(resources, dots=compiled.asm["ttir"].count(" tt.dot "))


def _source(
    build: Build, target: str
) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    """Return the kernel of a build, its signature, constants and options, equal to those that
    ``launch`` passes."""
    import triton.language as tl

    from reft_kernels._triton.backward import edit_params_grad_kernel, edit_rows_grad_kernel
    from reft_kernels._triton.configs import choose
    from reft_kernels._triton.forward import edit_rows_kernel

    kernel = {
        "edit_rows": edit_rows_kernel,
        "edit_rows_grad": edit_rows_grad_kernel,
        "edit_params_grad": edit_params_grad_kernel,
    }[build.kernel]
    config = choose(
        "params" if build.kernel == "edit_params_grad" else "rows",
        dim=build.dim,
        rank=build.rank,
        num_rows=build.num_rows,
        dtype=build.dtype,
        target=target,
    )
    gelu = build.variant == "gelu"
    values = {
        "DIM": build.dim,
        "RANK": build.rank,
        "SUBTRACT": gelu,
        "ACTIVATION": "gelu" if gelu else "",
        "SAVE_U": gelu,
        "SAVE_DS": gelu,
        "BLOCK_N": config.rows,
        "BLOCK_R": config.rank,
        "BLOCK_D": config.chunk,
        "DOT": config.dot,
        "PRECISION": config.precision,
        "STAGES": config.stages,
        "ACC": tl.float32,
        "stride_dim": 1,
        "grad_stride_dim": 1,
    }
    hidden_like = {"hidden_ptr", "grad_ptr", "out_ptr", "x_ptr"}
    signature, constants = {}, {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            integers = name in ("rows_ptr", "offsets_ptr", "slots_ptr")
            pointer = _POINTERS[build.dtype] if name in hidden_like else "*fp32"
            signature[name] = "*i64" if integers else pointer
        elif name.endswith("stride_row") or name in _INTEGERS:
            signature[name] = "i32"
        else:
            signature[name] = "constexpr"
            constants[name] = values.get(name, True)  # HAS_…, SAVE_…, WANT_…: all on
    return kernel, signature, constants, config.launch_options


def _nvidia_resources(cubin: bytes, shared: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _nvidia_tool("cuobjdump", "-res-usage", file.name)
        usage = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
        stack = usage["STACK"] + usage["LOCAL"]
        # Without local memory there is no spill. Otherwise count the stores, like ptxas: the stack
        # itself is rounded up to eight bytes.
        spills = stored_bytes(_nvidia_tool("nvdisasm", "-c", file.name)) if stack else 0
    return Resources(usage["REG"], shared, stack, spills)


def stored_bytes(sass: str) -> int:
    """Count the bytes that a thread writes to local memory in NVIDIA's assembly, each store once.

    The kernels declare no local arrays, so these are spilled registers.
    """
    widths = re.findall(r"\bSTL(?:\.(?!\d|U\d|S\d)\w+)*(?:\.[US]?(\d+))?", sass)
    return sum(int(width or 32) // 8 for width in widths)


def register_wgmma(ptx: str) -> int:
    """Count the wgmma instructions that take their left operand from registers.

    In PTX such an operand is a second list in braces; in shared memory it is one descriptor.
    """
    return len(re.findall(r"wgmma\.mma_async[^;]*?\},\s*\{[^;]*;", ptx))


def _nvidia_tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [str(tool), *arguments], capture_output=True, text=True, check=True
    ).stdout


def _amd_resources(assembly: str, shared: int) -> Resources:
    def read(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if match is None:
            raise RuntimeError(f"the assembly names no {key}")
        return int(match.group(1))

    return Resources(
        registers=read("vgpr_count"),
        shared=shared,
        stack=read("private_segment_fixed_size"),
        spills=4 * read("vgpr_spill_count"),
        scalar_spills=4 * read("sgpr_spill_count"),
    )
