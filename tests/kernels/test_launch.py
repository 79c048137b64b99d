"""Kernels are launched on the device of their tensors, whatever device is current.

Triton launches on the current device and its stream. A driver that launches nothing notes which
device that was, for tensors that say they are on another; in a process of its own, since the other
tests interpret the kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.host("a driver that launches nothing stands for two GPUs"),
]

ROOT = Path(__file__).parents[2]
SOURCE = """
import json, sys
import torch
from reft_kernels.devtools import stub_driver
from reft_kernels import RowPlan
from reft_kernels._triton import launch
from reft_kernels.spec import EditWeights, Wanted

there, current = int(sys.argv[1]), [0]

class Posing(torch.Tensor):
    is_cuda = True
    device = torch.device("cuda", there)

def exchange(index):
    before, current[0] = current[0], index
    return before

torch.cuda.current_device = lambda: current[0]
torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = exchange
stub_driver.StubDriver.get_current_device = lambda self: current[0]

def posing(*shape):
    return torch.zeros(shape).as_subclass(Posing)

plan = RowPlan(torch.arange(3), (0, 3))
weights = EditWeights(posing(1, 2, 16), posing(1, 2), posing(1, 2, 16))
with stub_driver.launching_nothing() as journal:
    saved = launch.edit_forward(posing(5, 16), plan, weights, save_rows=True, save_coeffs=True)
    launch.edit_backward(posing(5, 16), plan, weights, saved, Wanted(True, True, True, True))
    try:
        launch.edit_forward(posing(5, 16), None, weights, save_rows=False, save_coeffs=False)
    except AttributeError:
        pass
launches = [(launched.kernel, launched.device) for launched in journal.launches]
print(json.dumps({"launches": launches, "current": current[0]}))
"""


@pytest.mark.parametrize("there", [0, 1, 3])
def test_launches_go_to_the_device_of_the_tensors(there: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SOURCE, str(there)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kernels = ["edit_rows_kernel", "edit_rows_grad_kernel", "edit_params_grad_kernel"]
    assert found == {"launches": [[name, there] for name in kernels], "current": 0}
