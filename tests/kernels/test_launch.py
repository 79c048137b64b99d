"""Kernels are launched on the device of their tensors, whichever device is current.

Triton launches on the current device and its stream. A driver that launches nothing records which
device that was, for tensors that claim to be on another one. It runs in a separate process, because
the other tests interpret the kernels.
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
    pytest.mark.host("a driver that launches nothing replaces several GPUs"),
]

ROOT = Path(__file__).parents[2]
SOURCE = """
import json
import torch
from reft_kernels import RowPlan
from reft_kernels._triton import launch
from reft_kernels.devtools import stub_driver
from reft_kernels.spec import EditWeights, Wanted

current = [0]

def exchange(index):
    before, current[0] = current[0], index
    return before

torch.cuda.current_device = lambda: current[0]
torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = exchange
stub_driver.StubDriver.get_current_device = lambda self: current[0]
plan = RowPlan(torch.arange(3), (0, 3))

def launches_on(index):
    class OnDevice(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda", index)

    def zeros(*shape):
        return torch.zeros(shape).as_subclass(OnDevice)

    weights = EditWeights(zeros(1, 2, 16), zeros(1, 2), zeros(1, 2, 16))
    with stub_driver.launching_nothing() as journal:
        saved = launch.edit_forward(zeros(5, 16), plan, weights, save_rows=True, save_coeffs=True)
        launch.edit_backward(zeros(5, 16), plan, weights, saved, Wanted(True, True, True, True))
        try:
            launch.edit_forward(zeros(5, 16), None, weights, save_rows=False, save_coeffs=False)
        except AttributeError:
            pass
    return [(item.kernel, item.device) for item in journal.launches], current[0]

print(json.dumps([launches_on(index) for index in (0, 1, 3)]))
"""


def test_launches_go_to_the_device_of_the_tensors() -> None:
    """Also restores the current device, after success and after an error."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SOURCE],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    kernels = ["edit_rows_kernel", "edit_rows_grad_kernel", "edit_params_grad_kernel"]
    expected = [[[[name, index] for name in kernels], 0] for index in (0, 1, 3)]
    assert json.loads(done.stdout) == expected
