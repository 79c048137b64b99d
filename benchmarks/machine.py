"""What a number was measured on: device, driver, versions, commit, and the bandwidth of a copy."""

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
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver, threads, versions and commit, as they go into every row."""
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
    """The name its maker gave it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def folder_name(device: torch.device) -> str:
    """The folder of results of this device: "h100-80gb-hbm3", "h200", "cpu"."""
    if device.type != "cuda":
        return device.type
    words = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return words.removeprefix("nvidia-").removeprefix("amd-")


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def copy_bandwidth(device: torch.device, megabytes: int | None = None) -> float:
    """Bytes a second, read and written, of the device's own copy of a large tensor."""
    if megabytes is None:
        megabytes = 2048 if device.type == "cuda" else 128
    try:
        return _copied(device, megabytes * 2**20)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # for graphs and other processes


def _copied(device: torch.device, size: int) -> float:
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    samples = interleave(
        {"copy": lambda: clock(copy=lambda: target.copy_(source))}, Effort(1.0, 10, 50)
    )
    return 2 * size / quantiles(samples["copy"]["copy"]).median


def _driver() -> str | None:
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.splitlines()[0].strip() if found.stdout.strip() else None
