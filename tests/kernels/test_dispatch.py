"""Which backend runs and why; a named one works or raises; importing costs nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from reft_kernels import dispatch, explain, lowrank_edit
from reft_kernels.activations import TRITON_ACTIVATIONS
from reft_kernels.devtools.testing import Case, make_edit


def arguments(device, case=None, **changes):
    edit = make_edit(case or Case(65, 3, (4,)), device)
    named = {"encode": edit.encode, "bias": edit.bias, "decode": edit.decode}
    return {"hidden": edit.hidden, "plan": edit.plan, **named, **edit.options, **changes}


def run_python(source: str, **environment: str) -> str:
    """Run a fresh Python without TRITON_INTERPRET unless given; return its output."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", source], env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.interpreter("a GPU is not a CPU")
def test_auto_on_a_cpu_takes_the_torch_backend_with_a_reason(ran):
    given = arguments("cpu")
    choice = explain(**given)
    assert choice.backend == "torch" and "hidden is on cpu" in choice.reason
    lowrank_edit(**given)
    assert ran == {"torch.edit_forward": 1}


@pytest.mark.gpu
def test_auto_on_a_gpu_takes_the_kernels(device, ran):
    given = arguments(device)
    assert explain(**given).backend == "triton"
    lowrank_edit(**given)
    assert {name.split(".")[0] for name in ran} == {"triton"}


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_a_named_backend_runs(backend, device):
    given = arguments(device, backend=backend)
    choice = explain(**given)
    assert choice == (backend, "named by the caller")
    lowrank_edit(**given)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"activation": "mish"},
            r"activation 'mish' has no Triton branch \(there are gelu, relu, ",
        ),
        ({"case": Case(300, 257, (2,))}, "rank 257 is above 256"),
        ({"case": Case(4, 1, (1,) * 9)}, "the plan has 9 groups, more than 8"),
    ],
    ids=["activation", "rank", "groups"],
)
def test_an_unsupported_edit_raises_and_is_not_replaced(changes, reason, device, ran, monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_TRITON_GROUPS", 8)
    given = arguments(device, **changes)
    for function in (lowrank_edit, explain):
        with pytest.raises(ValueError, match=f"'triton' cannot do this edit: {reason}"):
            function(**given, backend="triton")
    assert not ran
    choice = explain(**given)
    assert choice.backend == "torch"
    lowrank_edit(**given)
    assert set(ran) == {"torch.edit_forward"}


@pytest.mark.gpu
def test_float64_on_a_gpu_is_pytorchs(device):
    given = arguments(device, Case(65, 3, (4,), dtype=torch.float64))
    assert explain(**given) == ("torch", "float64 is computed by PyTorch on a GPU")


def test_every_activation_promised_by_the_table_has_a_branch(device):
    """A name without one would silently be the identity."""
    outs = [
        lowrank_edit(**arguments(device, activation=name, backend="triton"))
        for name in (None, *sorted(TRITON_ACTIVATIONS))
    ]
    assert all((a - b).abs().max() > 0.01 for i, a in enumerate(outs) for b in outs[:i])


def test_explain_computes_nothing(device, ran):
    given = arguments(device)
    before = given["hidden"].clone()
    explain(**given)
    assert torch.equal(given["hidden"], before) and not ran


@pytest.mark.host("a separate process, on the CPU")
def test_without_the_interpreter_a_cpu_has_no_kernels():
    """Importing the package and editing with torch loads neither triton nor transformers."""
    source = """
import sys
import torch
from reft_kernels import RowPlan, explain, lowrank_edit
given = torch.ones(2, 4), RowPlan.from_rows([1]), None, torch.ones(1), torch.ones(1, 4)
lowrank_edit(*given)
print(sorted({name.split(".")[0] for name in sys.modules} & {"triton", "transformers"}))
print(explain(*given))
try:
    lowrank_edit(*given, backend="triton")
except ValueError as error:
    print(error)
"""
    loaded, auto, error = run_python(source).splitlines()
    assert loaded == "[]"
    assert auto.startswith("Choice(backend='torch'") and "hidden is on cpu" in auto
    assert error.startswith(
        "backend 'triton' cannot do this edit: hidden is on cpu; the kernels need"
    )
    assert error.endswith("TRITON_INTERPRET=1")


@pytest.mark.host("a separate process, on the CPU")
def test_without_triton_everything_else_works():
    """Imports of triton fail, as on a machine without it: torch and reference need torch only."""
    source = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import torch
from reft_kernels import RowPlan, explain, loreft, lowrank_edit, orthonormalize
given = torch.ones(2, 4), RowPlan.from_rows([1]), None, torch.ones(1), torch.ones(1, 4)
for backend in ("auto", "torch", "reference"):
    assert lowrank_edit(*given, backend=backend).tolist() == [[1.0] * 4, [2.0] * 4]
assert orthonormalize(torch.zeros(4, 2)).shape == (2, 4)
try:
    lowrank_edit(*given, backend="triton")
except ValueError as error:
    print(error)
assert "triton" not in sys.modules
"""
    assert run_python(source) == "backend 'triton' cannot do this edit: triton is not installed"
