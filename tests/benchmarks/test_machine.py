"""The machine: names of results folders, and versions."""

from __future__ import annotations

import pytest
import torch

from benchmarks import machine


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
        ("NVIDIA H200", "h200"),
        ("AMD Instinct MI300X", "instinct-mi300x"),
    ],
)
def test_folder_of_a_gpu(monkeypatch, name, folder):
    monkeypatch.setattr(machine, "device_name", lambda device: name)
    assert machine.folder_name(torch.device("cuda")) == folder


def test_description_of_a_cpu():
    device = torch.device("cpu")
    assert machine.folder_name(device) == "cpu"
    described = machine.describe(device)
    assert described["device"] and described["kind"] == "cpu" and described["driver"] is None
    assert described["torch"] == torch.__version__ == machine.installed("torch")
    assert machine.installed("no-such-package") is None
