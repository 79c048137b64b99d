"""Imports point one way, importing loads nothing heavy, torch paths need torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("reft_kernels", "reft", "benchmarks")

#: The layers, lowest first. A module may import its own package and the layers below it; every
#: import counts, in functions and under TYPE_CHECKING too. ``reft/__init__.py`` and
#: ``reft/__main__.py`` stand above all layers.
LAYERS: list[set[str]] = [
    {"reft_kernels"},
    {"reft.safe_read", "reft.positions", "reft.subspaces", "reft.field_checks"}
    | {"reft.foreign_names", "reft.peft_type", "reft.absent"},
    {"reft.config"},
    {"reft.io"},
    {"reft.adapter"},
    {"reft.model"},
    {"reft.train", "reft.interop", "reft.serving", "reft.evaluation"},
    {"reft.paper", "reft.demo"},
    {"reft.cli"},
    {"benchmarks"},
]

#: Modules of a layer that may import each other: the lowest ones are single files.
FILES = LAYERS[1]

#: (importing module, imported module that it must not reach, reason)
FORBIDDEN = [
    ("reft_kernels.reference", "reft_kernels._triton", "the reference is no implementation"),
    ("reft_kernels.reference", "reft_kernels.torch_backend", "the reference is no implementation"),
    ("reft_kernels._triton", "reft_kernels.reference", "backends do not know the reference"),
    ("reft_kernels._triton", "reft_kernels.torch_backend", "backends do not know each other"),
    ("reft_kernels", "transformers", "kernels do not know models"),
    ("reft.config", "transformers", "a configuration is read without transformers"),
    ("reft.io", "transformers", "adapter files are read without transformers"),
    ("reft.adapter", "transformers", "an adapter's numbers need torch alone"),
    ("reft.paper.tasks", "reft.model", "a task knows no model"),
    ("reft.paper.tasks", "reft.train", "a task knows no training"),
    ("reft.paper.tasks", "reft.paper.presets", "a task knows no preset"),
    ("reft.paper.tasks", "reft.paper.runs", "a task knows no run"),
    ("reft.paper.presets", "transformers", "presets are read without transformers"),
    ("reft.paper.presets", "reft.model", "a preset is data"),
    ("reft.paper.presets", "reft.train", "a preset is data"),
    ("reft.paper.presets", "reft.paper.runs", "a preset is data"),
    ("reft", "reft_kernels.devtools", "developer tools are not in the wheel"),
    ("reft", "tests", "the library does not know its tests"),
    ("benchmarks", "reft_kernels._triton", "benchmarks use public names"),
]


@cache
def _modules() -> dict[str, Path]:
    modules = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(path: Path, *, on_import: bool = False) -> set[str]:
    """Every dotted name that a file imports; ``on_import`` leaves out functions and
    TYPE_CHECKING."""
    skipped: set[int] = set()
    for node in ast.walk(_tree(path)):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if on_import and (typing_only or deferred):
            skipped |= {id(inner) for inner in ast.walk(node)}
    names: set[str] = set()
    for node in ast.walk(_tree(path)):
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


def _layer(module: str) -> int | None:
    """The index of a module's layer; None for the front door of a package."""
    for index, packages in enumerate(LAYERS):
        if any(_under(module, package) for package in packages):
            return index
    return None


def _package(module: str) -> str:
    return next(package for layer in LAYERS for package in layer if _under(module, package))


def _edges() -> Iterator[tuple[str, str]]:
    """(importing module, imported module) for all files of the project."""
    modules = _modules()
    for module, path in modules.items():
        for name in _imports(path):
            # ``from package import name`` names a module, or an attribute of the package.
            if name in modules and name != module and not module.startswith(f"{name}."):
                yield module, name


def test_every_module_has_a_layer() -> None:
    without = {module for module in _modules() if _layer(module) is None}
    assert without == {"reft", "reft.__main__"}


def test_imports_point_to_lower_layers() -> None:
    upward = []
    for importer, imported in _edges():
        above, below = _layer(importer), _layer(imported)
        if above is None or below is None:
            continue
        same = above == below and (_package(importer) == _package(imported) or importer in FILES)
        if not (below < above or same):
            upward.append(f"{importer} imports {imported}")
    assert not upward


def test_no_file_imports_itself_in_a_circle() -> None:
    edges: dict[str, set[str]] = {module: set() for module in _modules()}
    for importer, imported in _edges():
        edges[importer].add(imported)
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join((*trail[trail.index(module) :], module))
        if module in done:
            return
        for imported in sorted(edges[module]):
            visit(imported, (*trail, module))
        done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize(("importer", "imported", "reason"), FORBIDDEN)
def test_forbidden_direction(importer: str, imported: str, reason: str) -> None:
    edges = [
        f"{module} imports {name}"
        for module, path in _modules().items()
        if _under(module, importer)
        for name in _imports(path)
        if _under(name, imported)
    ]
    assert not edges, f"{reason}: {edges}"


def test_the_kernels_do_without_their_developer_tools() -> None:
    tools = "reft_kernels.devtools"
    for module, path in _modules().items():
        if _under(module, "reft_kernels") and not _under(module, tools):
            assert not [name for name in _imports(path) if _under(name, tools)], module


def test_only_the_launcher_and_the_compile_report_touch_kernels() -> None:
    kernels = ("reft_kernels._triton.forward", "reft_kernels._triton.backward")
    allowed = {"reft_kernels._triton.launch", "reft_kernels.devtools.compile_report"}
    for module, path in _modules().items():
        if module not in allowed:
            assert not [name for name in _imports(path) if name.startswith(kernels)], module


#: (imported name, modules that may import it when they are imported)
LAZY = {
    "triton": "reft_kernels._triton",
    "lm_eval": "reft.evaluation",
    "reft.model.continuous_manager": "reft.model.continuous_manager",
}


@pytest.mark.parametrize("name", LAZY)
def test_heavy_modules_are_imported_when_they_are_used(name: str) -> None:
    for module, path in _modules().items():
        inside = _under(module, LAZY[name]) and module != "reft_kernels._triton"
        if not inside:
            imported = [each for each in _imports(path, on_import=True) if _under(each, name)]
            assert not imported, f"{module} imports {name} when it is imported"


def test_the_harness_is_imported_by_its_module_alone() -> None:
    for module, path in _modules().items():
        if not _under(module, "reft.evaluation"):
            assert not [name for name in _imports(path) if _under(name, "lm_eval")], module


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
