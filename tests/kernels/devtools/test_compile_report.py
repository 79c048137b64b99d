"""Resources of builds for GPUs that are not present, and the command that lists them.

Compiled and interpreted kernels cannot live in one process, and the other tests interpret. So the
compiler runs in a separate process.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from reft_kernels.devtools import compile_report

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.host("compiles for GPUs that are not here, by name"),
]

ROOT = Path(__file__).parents[3]
#: Corners of the matrix, and the builds for which the launch settings had to be changed.
BUILDS = [
    ("cuda:80", "edit_rows", "linear", 8192, 1, "float32"),
    ("cuda:80", "edit_rows", "gelu", 4096, 64, "float32"),
    ("cuda:80", "edit_rows_grad", "linear", 768, 2, "bfloat16"),
    ("cuda:80", "edit_params_grad", "gelu", 768, 4, "float32"),
    ("cuda:80", "edit_params_grad", "gelu", 768, 64, "float32"),
    ("cuda:90", "edit_rows", "gelu", 768, 1, "bfloat16"),
    ("cuda:90", "edit_rows", "linear", 4096, 8, "float16"),
    ("cuda:90", "edit_rows_grad", "gelu", 4096, 64, "float32"),
    ("cuda:90", "edit_params_grad", "gelu", 4096, 8, "bfloat16"),
    ("cuda:90", "edit_params_grad", "linear", 4096, 64, "bfloat16"),
    ("cuda:100", "edit_rows", "linear", 4096, 64, "bfloat16"),
    ("cuda:100", "edit_rows_grad", "gelu", 8192, 4, "float32"),
    ("cuda:100", "edit_params_grad", "linear", 768, 1, "float32"),
    ("hip:gfx942", "edit_rows", "gelu", 4096, 8, "float32"),
    ("hip:gfx942", "edit_rows_grad", "gelu", 4096, 64, "float32"),
    ("hip:gfx942", "edit_params_grad", "linear", 768, 1, "bfloat16"),
    ("cuda:80", "edit_rows", "gelu", 2048, 64, "float32", 8192),
    ("cuda:90", "edit_rows", "linear", 4096, 8, "bfloat16", 8192),
    ("cuda:90", "edit_params_grad", "gelu", 8192, 4, "float32", 8192),
    ("hip:gfx942", "edit_rows", "gelu", 4096, 8, "bfloat16", 8192),
    ("cuda:90", "edit_params_grad", "gelu", 4096, 128, "bfloat16"),
    ("cuda:90", "edit_params_grad", "gelu", 768, 200, "float32"),
    ("cuda:90", "edit_params_grad", "gelu", 4096, 256, "bfloat16", 8192),
    ("cuda:90", "edit_rows", "gelu", 4096, 256, "float32"),
    ("cuda:90", "edit_rows", "gelu", 4096, 32, "bfloat16", 8192),
    ("cuda:90", "edit_rows", "linear", 2048, 64, "float16", 8192),
    ("cuda:90", "edit_rows_grad", "linear", 4096, 8, "bfloat16", 8192),
    ("cuda:90", "edit_rows_grad", "gelu", 4096, 64, "float16", 8192),
    ("cuda:90", "edit_rows", "linear", 768, 1, "float32", 2048),
    ("cuda:90", "edit_rows", "gelu", 768, 2, "bfloat16", 2048),
    ("cuda:90", "edit_params_grad", "gelu", 768, 1, "bfloat16"),
    ("cuda:90", "edit_params_grad", "linear", 768, 2, "float32"),
]
#: Bytes that one release of Triton spills in a build where others spill nothing.
SPILLED = {("3.6", BUILDS[4]): 28}
#: Settings for which the registers are too few.
STARVED = [
    (("cuda:90", "edit_rows", "gelu", 768, 64, "float32"), {"max_registers": 32}),
    (("hip:gfx942", "edit_rows", "linear", 768, 8, "float32"), {"rows": 32, "chunk": 512}),
]
#: Settings from which Triton makes a wgmma with its left operand in registers.
WGMMA = (("cuda:90", "edit_rows", "linear", 4096, 8, "bfloat16", 8192), {"rows": 64, "chunk": 64})
COMPILE = """
import dataclasses, json, sys
import torch
from reft_kernels.devtools import compile_report
from reft_kernels._triton import configs

choose = configs.choose
for (target, kernel, variant, dim, rank, dtype, *rows), changes in json.load(sys.stdin):
    configs.choose = lambda *a, **k: dataclasses.replace(choose(*a, **k), **changes)
    build = compile_report.Build(kernel, variant, dim, rank, getattr(torch, dtype), *rows)
    print(json.dumps(compile_report.compile_build(build, target).as_dict()))
"""


def uninterpreted(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, int]]:
    """The resources of BUILDS, then of STARVED, then of WGMMA."""
    requests = [(build, {}) for build in BUILDS] + STARVED + [WGMMA]
    done = uninterpreted("-c", COMPILE, stdin=json.dumps(requests))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_builds_fit(compiled: list[dict[str, int]]) -> None:
    release = ".".join(version("triton").split(".")[:2])
    for build, resources in zip(BUILDS, compiled[: len(BUILDS)], strict=True):
        amd = build[0].startswith("hip")
        assert max(resources["spills"], resources["stack"]) <= SPILLED.get((release, build), 0), (
            build
        )
        assert resources["scalar_spills"] == 0, (build, resources)
        assert 16 <= resources["registers"] <= (512 if amd else 255), (build, resources)
        assert resources["shared"] <= (64 if amd else 100) * 1024, (build, resources)


@pytest.mark.slow
def test_a_spill_is_seen(compiled: list[dict[str, int]]) -> None:
    nvidia, amd, _ = compiled[len(BUILDS) :]
    # A store of four bytes at least for every slot of the stack, which is padded to eight.
    assert nvidia["registers"] <= 32
    assert 0 < nvidia["stack"] <= nvidia["spills"] + 4, nvidia
    assert amd["stack"] > 0, amd
    assert amd["spills"] > 0, amd


@pytest.mark.slow
def test_no_wgmma_has_an_operand_in_registers(compiled: list[dict[str, int]]) -> None:
    """Triton before 3.7 and ptxas before CUDA 13.3 may overwrite it while it is read."""
    for build, resources in zip(BUILDS, compiled[: len(BUILDS)], strict=True):
        assert resources["register_wgmma"] == 0, build
    assert compiled[-1]["register_wgmma"] > 0, "the pattern is no longer recognised"


@pytest.mark.slow
def test_sums_of_few_ranks_stay_sums(compiled: list[dict[str, int]]) -> None:
    """Triton makes a tf32 matrix product of a sum over products of one form. Triton 3.6 computes it
    wrongly on matrix units for fewer than 8 ranks."""
    for build, resources in zip(BUILDS, compiled[: len(BUILDS)], strict=True):
        if build[4] <= 8 and (len(build) == 6 or build[6] <= 2048):
            assert resources["dots"] == 0, build
    assert compiled[-1]["dots"] > 0, "matrix products are no longer recognised"


@pytest.mark.parametrize(
    ("ptx", "count"),
    [
        ("wgmma.mma_async.sync.aligned.m64n16k8.f32.tf32.tf32 {%f1,%f2}, {%r1,%r2}, %rd1, 1;", 1),
        ("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f1,%f2}, %rd2, %rd1, 1;", 0),
        ("wgmma.wait_group.sync.aligned 0;\nmma.sync.m16n8k8 {%f1}, {%r1}, {%r2}, {%f1};", 0),
    ],
)
def test_operands_of_wgmma_are_read_from_ptx(ptx: str, count: int) -> None:
    assert compile_report.register_wgmma(ptx) == count


@pytest.mark.slow
def test_the_command_prints_a_row_a_build() -> None:
    shapes = ("--dims", "64", "--ranks", "1,16", "--dtypes", "bf16", "--rows", "14")
    done = uninterpreted(
        *("-m", "benchmarks", "compile", "--target", "cuda:90", "--kernels", "edit_rows"),
        *(*shapes, "--jobs", "2", "--json"),
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    named = [(row["variant"], row["r"]) for row in rows]
    assert named == [("linear", 1), ("linear", 16), ("gelu", 1), ("gelu", 16)]
    for row in rows:
        assert row["target"] == "cuda:90"
        assert (row["kernel"], row["D"], row["dtype"]) == ("edit_rows", 64, "bf16")
        assert 16 <= row["registers"] <= 255
        assert row["shared"] > 0
        assert row["stack"] == row["spills"] == row["scalar_spills"] == 0
        assert row["error"] is None
        assert row["triton"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.compile")


def invoke(command: ModuleType, *arguments: str) -> Result:
    app = typer.Typer()
    app.command()(command.compile_kernels)
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--target", "cuda:91"], "cuda:80, cuda:90, cuda:100, hip:gfx942, got 'cuda:91'"),
        (["--target", "cuda:90"], "TRITON_INTERPRET=1"),
        (["--dims", "768,x"], "--dims takes positive integers separated by commas, got '768,x'"),
        (["--rows", "many"], "--rows takes positive integers separated by commas, got 'many'"),
        (["--ranks", "0"], "--ranks takes positive integers separated by commas, got '0'"),
        (["--dtypes", "fp8"], "--dtypes takes fp32, bf16, fp16, got 'fp8'"),
        (
            ["--kernels", "edit"],
            "--kernels takes edit_rows, edit_rows_grad, edit_params_grad, got",
        ),
    ],
)
def test_a_bad_option_gives_a_one_line_error(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str], named: str
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1" if named.startswith("TRITON") else "0")
    result = invoke(command, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert named in result.stderr
    assert result.stderr.count("\n") == 1


def test_spills_and_failures_are_named(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_build(build: compile_report.Build, target: str) -> compile_report.Resources:
        if build.rank == 4:
            raise RuntimeError("no such instruction\nand more")
        spilled = 8 if build.rank == 64 and build.variant == "gelu" else 0
        return compile_report.Resources(200, 4096, spilled, spilled)

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(compile_report, "compile_build", compile_build)
    question = ("--target", "cuda:80", "--kernels", "edit_rows", "--dims", "768", "--jobs", "1")
    filters = (*question, "--dtypes", "fp16", "--rows", "448")

    result = invoke(command, *filters, "--ranks", "1,4,64", "--json")
    assert result.exit_code == 1
    rows: list[dict[str, Any]] = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["spills"] for row in rows] == [0, None, 0, 0, None, 8]
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: 3 of 6 builds: ")
    assert "cuda:80 edit_rows gelu D=768 r=64 fp16 n=448: 8 bytes spilled" in error
    assert (
        "cuda:80 edit_rows linear D=768 r=4 fp16 n=448: RuntimeError: no such instruction" in error
    )

    result = invoke(command, *filters, "--ranks", "1")
    assert result.exit_code == 0
    assert "edit_rows" in result.stdout
    assert "4096" in result.stdout


@pytest.mark.parametrize(
    ("sass", "stored"),
    [
        ("/*01b0*/ STL [R1+0x4], R16 ;\n/*0ef0*/ LDL.LU R16, [R1+0x4] ;", 4),
        ("@!P0 STL.64 [R1], R2 ;\nSTL.128 [R1+0x10], R4 ;", 24),
        ("STL.U8 [R1], R2 ;\nSTL.S16 [R1], R2 ;\nSTL.STRONG.64 [R1], R2 ;", 11),
        ("STG.E.128 [R2.64], R4 ;\nSTS.128 [R3], R4 ;", 0),
    ],
)
def test_bytes_stored_to_local_memory(sass: str, stored: int) -> None:
    assert compile_report.stored_bytes(sass) == stored


def test_every_build_of_the_matrix_once() -> None:
    import torch

    builds = list(compile_report.builds((768, 4096), (1, 8, 64), (torch.float32, torch.bfloat16)))
    assert len(builds) == len(set(builds)) == 3 * 2 * 2 * 3 * 2 * 2
    assert {build.num_rows for build in builds} == set(compile_report.ROWS)
