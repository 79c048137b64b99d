"""Compile the kernels without a GPU and read what they would occupy on one.

``triton.compile`` needs only a target's name. For NVIDIA the cubin is then read by Triton's own
``cuobjdump -res-usage``, for AMD the resources stand in the assembly. A spill shows as local or
scratch memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from reft_kernels import _triton

_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
#: Rows of the largest group: f7+l7 times a batch of 32.
_ROWS = 448


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel build: everything that is compiled into it.

    Attributes:
        kernel: "edit_rows", "edit_rows_grad" or "edit_params_grad".
        variant: "linear" (the folded edit) or "gelu" (activation with the subtraction beside it,
            the largest).
    """

    kernel: str
    variant: str
    dim: int
    rank: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Resources:
    """What a build occupies: registers a thread, bytes of shared memory a block, bytes of stack and of
    spilled registers a thread."""

    registers: int
    shared: int
    stack: int
    spills: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def builds(
    dims: tuple[int, ...], ranks: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> Iterator[Build]:
    """Every build of a matrix of shapes: three kernels, two variants each."""
    for kernel in ("edit_rows", "edit_rows_grad", "edit_params_grad"):
        for variant in ("linear", "gelu"):
            for dim in dims:
                for rank in ranks:
                    for dtype in dtypes:
                        yield Build(kernel, variant, dim, rank, dtype)


def compile_build(build: Build, target: str) -> Resources:
    """Compile one build.

    Args:
        target: "cuda:80", "cuda:90", "cuda:100" or "hip:gfx942".

    Raises:
        ValueError: an unknown target.
        RuntimeError: kernels are interpreted (TRITON_INTERPRET=1), so there is nothing to compile.
    """
    if _triton.interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 replaces the kernels by Python: unset it to compile")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, _, arch = target.partition(":")
    if backend == "cuda" and arch.isdigit():
        gpu = GPUTarget("cuda", int(arch), 32)
    elif backend == "hip" and arch.startswith("gfx"):
        gpu = GPUTarget("hip", arch, 64)
    else:
        raise ValueError(f"target must be cuda:<capability> or hip:<gfx…>, got {target!r}")
    kernel, signature, constants, options = _source(build, hip=backend == "hip")
    names = kernel.arg_names
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind != "constexpr"
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=gpu, options=options)
    if backend == "cuda":
        return _nvidia_resources(compiled.asm["cubin"], compiled.metadata.shared)
    return _amd_resources(compiled.asm["amdgcn"], compiled.metadata.shared)


def _source(build: Build, hip: bool) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    """The kernel of a build with its signature, constants and launch options, as ``launch`` passes them."""
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
        num_rows=_ROWS,
        dtype=build.dtype,
        hip=hip,
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
        "ACC": tl.float32,
        "stride_dim": 1,
        "grad_stride_dim": 1,
    }
    hidden_like = {"hidden_ptr", "grad_ptr", "out_ptr", "x_ptr"}
    signature, constants = {}, {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            integers = name in ("rows_ptr", "offsets_ptr")
            pointer = _POINTERS[build.dtype] if name in hidden_like else "*fp32"
            signature[name] = "*i64" if integers else pointer
        elif name.endswith("stride_row"):
            signature[name] = "i32"
        else:
            signature[name] = "constexpr"
            constants[name] = values.get(name, True)  # HAS_…, SAVE_…, WANT_…: all on
    return kernel, signature, constants, config.launch_options


def _nvidia_resources(cubin: bytes, shared: int) -> Resources:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    # Nothing here declares local arrays: local memory and stack are spilled registers.
    return Resources(found["REG"], shared, found["STACK"], found["LOCAL"] + found["STACK"])


def _amd_resources(assembly: str, shared: int) -> Resources:
    def read(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if match is None:
            raise RuntimeError(f"the assembly names no {key}")
        return int(match.group(1))

    spilled = 4 * (read("vgpr_spill_count") + read("sgpr_spill_count"))
    return Resources(read("vgpr_count"), shared, read("private_segment_fixed_size"), spilled)
