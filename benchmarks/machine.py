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

from benchmarks.timing import Clock, Effort, interleave, quantiles

ROOT = Path(__file__).resolve().parents[1]
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
        "commit": _commit(),
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
    """The folder of results of this device: "h200", "cpu"."""
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
    source = torch.rand(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    samples = interleave(
        {"copy": lambda: clock(copy=lambda: target.copy_(source))}, Effort(1.0, 10, 50)
    )
    return 2 * source.numel() * 4 / quantiles(samples["copy"]["copy"]).median


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


def _commit() -> str | None:
    """The checkout's commit, with ``+`` if a file of the packages differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "reft", "reft_kernels", "benchmarks/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
