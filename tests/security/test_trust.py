"""The promises of SECURITY.md about code: no call of the library trusts foreign code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _calls() -> Iterator[tuple[Path, str, dict[str, ast.expr]]]:
    """Yield (file, called name, keywords) of every call in the library."""
    for package in ("reft", "reft_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    keywords = {
                        keyword.arg: keyword.value for keyword in node.keywords if keyword.arg
                    }
                    yield path, ast.unparse(node.func), keywords


def test_remote_code_is_never_trusted():
    assert not [path for path, _, keywords in _calls() if "trust_remote_code" in keywords]


def test_every_load_of_torch_takes_weights_only():
    loads = [(path, keywords) for path, name, keywords in _calls() if name == "torch.load"]
    assert loads
    for path, keywords in loads:
        assert ast.unparse(keywords["weights_only"]) == "True", path


def test_nothing_unpickles_or_evaluates():
    executed = {"pickle.load", "pickle.loads", "eval", "exec", "os.system", "joblib.load"}
    assert not [(path, name) for path, name, _ in _calls() if name in executed]


def test_every_test_that_is_named_is_there():
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`((?:tests/\w+/)?test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 10
    for file, test in named:
        path = ROOT / file if "/" in file else ROOT / "tests/security" / file
        assert path.is_file(), file
        assert not test or f"def {test}(" in path.read_text(), test
    from fuzz import TARGETS

    rows = re.findall(r"fuzz targets? ((?:`\w+`(?:, )?)+)", text)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == TARGETS.keys()
    makefile = (ROOT / "Makefile").read_text()
    assert f"TARGETS ?= {' '.join(TARGETS)}" in makefile
