"""The machine of a measurement: device, driver, versions, commit, and the bandwidth of a copy."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.revision import ROOT as ROOT
from benchmarks.revision import commit
from benchmarks.timing import Clock, Effort, interleave, quantiles

_PACKAGES = ("torch", "triton", "transformers")


def default_device() -> torch.device:
    """The GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver, threads, versions and commit, as every row records them."""
    return {
        "device": device_name(device),
        "kind": device.type,
        "driver": _driver() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: installed(name) for name in _PACKAGES},
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    """The model name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return model[1].strip() if model else platform.machine()


def folder_name(device: torch.device) -> str:
    """The name of the results folder of a device: "h100-80gb-hbm3", "h200", "cpu"."""
    if device.type != "cuda":
        return device.type
    words = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return words.removeprefix("nvidia-").removeprefix("amd-")


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def copy_bandwidth(device: torch.device, megabytes: int | None = None) -> float:
    """Bytes per second, read and written, of copying a large tensor on the device."""
    if megabytes is None:
        megabytes = 2048 if device.type == "cuda" else 128
    try:
        return _measure_copy(device, megabytes * 2**20)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # leave the memory to graphs and other processes


def _measure_copy(device: torch.device, size: int) -> float:
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    samples = interleave(
        {"copy": lambda: clock(copy=lambda: target.copy_(source))}, Effort(1.0, 10, 50)
    )
    return 2 * size / quantiles(samples["copy"]["copy"]).median


def _driver() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None
