"""Imports point one way, importing loads nothing heavy, torch paths need torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: (importing module prefix, imported module prefix that it must not reach, why)
FORBIDDEN = [
    ("reft_kernels", "reft", "the kernels know nothing of models"),
    ("reft_kernels", "transformers", "the kernels know nothing of models"),
    ("reft_kernels", "benchmarks", "imports point one way"),
    ("reft_kernels.reference", "reft_kernels._triton", "the meaning is not an implementation"),
    (
        "reft_kernels.reference",
        "reft_kernels.torch_backend",
        "the meaning is not an implementation",
    ),
    ("reft_kernels._triton", "reft_kernels.reference", "implementations are strangers"),
    ("reft_kernels._triton", "reft_kernels.torch_backend", "implementations are strangers"),
    ("reft.config", "transformers", "a configuration is readable without transformers"),
    ("reft.positions", "transformers", "torch only"),
    ("reft.nn", "transformers", "torch only"),
    ("reft.nn", "reft.model", "imports point one way"),
    ("reft.model", "reft.train", "imports point one way"),
    ("reft.model", "reft.cli", "imports point one way"),
    ("reft.model", "reft.evaluation", "imports point one way"),
    ("reft.serving.stored", "transformers", "served adapters need no model library"),
    ("reft.serving.tables", "transformers", "torch only"),
    ("reft.serving.tables", "reft.model", "torch only"),
    ("reft.serving.places", "reft.model", "torch only"),
    ("reft.serving.pool", "reft.model.reft_model", "imports point one way"),
    ("reft.model", "reft.serving.vllm", "an engine of its own"),
    ("reft.serving", "reft.train", "imports point one way"),
    ("reft.serving", "reft.cli", "imports point one way"),
    ("reft.evaluation", "reft.train", "imports point one way"),
    ("reft.evaluation", "reft.cli", "imports point one way"),
    ("reft.train", "reft.evaluation", "imports point one way"),
    ("reft.demo", "reft.evaluation", "imports point one way"),
    ("reft.model", "reft.interop", "imports point one way"),
    ("reft.interop", "reft.train", "imports point one way"),
    ("reft.interop", "reft.cli", "imports point one way"),
    ("reft.train", "reft.cli", "imports point one way"),
    ("reft.train", "reft.demo", "imports point one way"),
    ("reft.demo", "reft.cli", "imports point one way"),
    ("reft.tasks", "reft.model", "a task knows no model"),
    ("reft.tasks", "reft.train", "a task knows no training"),
    ("reft.tasks", "reft.presets", "imports point one way"),
    ("reft.tasks", "reft.runs", "imports point one way"),
    ("reft.tasks", "reft.cli", "imports point one way"),
    ("reft.presets", "transformers", "presets are read without transformers"),
    ("reft.presets", "reft.model", "a preset is data"),
    ("reft.presets", "reft.train", "a preset is data"),
    ("reft.presets", "reft.runs", "imports point one way"),
    ("reft.presets", "reft.cli", "imports point one way"),
    ("reft.model", "reft.presets", "imports point one way"),
    ("reft.train", "reft.runs", "imports point one way"),
    ("reft.train", "reft.presets", "imports point one way"),
    ("reft.runs", "reft.cli", "imports point one way"),
    ("reft.serving.tables", "transformers", "torch only"),
    ("reft.serving.places", "transformers", "torch only"),
    ("reft.serving.requests", "transformers", "torch only"),
    ("reft.serving.requests", "reft.model", "imports point one way"),
    ("reft.serving.continuous", "reft.model", "imports point one way"),
    ("reft", "benchmarks", "imports point one way"),
    ("reft", "reft_kernels.devtools", "developer tools are not in the wheel"),
    ("reft", "tests", "imports point one way"),
    ("benchmarks", "reft_kernels._triton", "benchmarks use public names"),
]


def _modules() -> dict[str, Path]:
    found = {}
    for package in ("reft_kernels", "reft", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(path: Path, *, module_level: bool = False) -> set[str]:
    """Every dotted name that a file imports, but for those under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    skipped: set[int] = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        deferred = module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if typing_only or deferred:
            skipped |= {id(inner) for inner in ast.walk(node)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


@pytest.mark.parametrize(("importer", "imported", "why"), FORBIDDEN)
def test_forbidden_direction(importer: str, imported: str, why: str) -> None:
    found = [
        f"{module} imports {name}"
        for module, path in _modules().items()
        if _under(module, importer)
        for name in _imports(path)
        if _under(name, imported)
    ]
    assert not found, f"{why}: {found}"


def test_the_kernels_do_without_their_developer_tools() -> None:
    tools = "reft_kernels.devtools"
    for module, path in _modules().items():
        if _under(module, "reft_kernels") and not _under(module, tools):
            assert not [name for name in _imports(path) if _under(name, tools)], module


def test_only_the_launcher_and_the_offline_compiler_touch_kernels() -> None:
    kernels = ("reft_kernels._triton.forward", "reft_kernels._triton.backward")
    allowed = {"reft_kernels._triton.launch", "reft_kernels.devtools.compile_report"}
    for module, path in _modules().items():
        if module not in allowed:
            assert not [n for n in _imports(path) if n.startswith(kernels)], module


def test_triton_is_imported_lazily() -> None:
    for module, path in _modules().items():
        inside = _under(module, "reft_kernels._triton") and module != "reft_kernels._triton"
        if not inside:
            named = [n for n in _imports(path, module_level=True) if _under(n, "triton")]
            assert not named, f"{module} imports triton when it is imported"


def test_the_harness_is_imported_by_its_own_module_alone() -> None:
    for module, path in _modules().items():
        if not _under(module, "reft.evaluation"):
            assert not [n for n in _imports(path) if _under(n, "lm_eval")], module


def test_continuous_batching_is_imported_when_it_is_used() -> None:
    named = {
        module
        for module, path in _modules().items()
        if "reft.serving.continuous" in _imports(path, module_level=True)
    }
    assert not named, "transformers' engine is loaded by those who call it"


def test_no_cycles() -> None:
    modules = _modules()
    edges = {
        module: {
            name
            for name in _imports(path, module_level=True)
            if name in modules and name != module and not module.startswith(f"{name}.")
        }
        for module, path in modules.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join((*trail, module))
        if module in done:
            return
        for other in edges[module]:
            visit(other, (*trail, module))
        done.add(module)

    for module in edges:
        visit(module, ())


def _python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_kernels_loads_neither_triton_nor_transformers() -> None:
    heavy = "[n for n in ('triton', 'transformers') if n in sys.modules]"
    code = f"import sys, reft_kernels; print({heavy})"
    assert _python(code) == "[]"


def test_torch_paths_need_torch_alone() -> None:
    code = """
import sys
sys.modules["triton"] = sys.modules["transformers"] = None  # any import of them fails
import torch, reft_kernels
h, plan = torch.randn(4, 8), reft_kernels.RowPlan.from_rows([0, 2])
w, b, r = torch.randn(2, 8), torch.randn(2), torch.randn(2, 8)
want = reft_kernels.reference.loreft(h, plan, r, w, b)
got = reft_kernels.loreft(h, plan, r, w, b)
print(bool((want - got).norm() < 1e-5 * want.norm()))
"""
    assert _python(code) == "True"
