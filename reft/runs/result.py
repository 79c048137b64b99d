"""What a run leaves behind: ``run.json`` when it begins, ``result.json`` when it is done.

``run.json`` says what the run is: the preset as it was resolved, the model, the seed, and the hash
of the data. A run is continued only where all of it is the same. ``result.json`` adds what came
out. Both are written beside and renamed.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RUN_FILE = "run.json"
RESULT_FILE = "result.json"

#: Of the stored form.
FORMAT_VERSION = 1

_PACKAGES = ("reft", "torch", "triton", "transformers", "accelerate", "datasets", "tokenizers")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON, replacing the file in one step. NaN is written as null."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(target)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read one of the two files.

    Raises:
        ValueError: not JSON, not an object, or of a newer format.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    found = value.get("format_version") if isinstance(value, dict) else None
    if not isinstance(found, int) or not 1 <= found <= FORMAT_VERSION:
        raise ValueError(
            f"{path} must be a run of format 1 … {FORMAT_VERSION}, got "
            f"{found if isinstance(value, dict) else type(value).__name__}"
        )
    return value


def differences(stored: Any, wanted: Any, path: str = "") -> Iterator[str]:
    """Where two JSON values differ, one line each: ``train.epochs: 6 there, 3 here``."""
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        for name in dict.fromkeys([*stored, *wanted]):
            inner = f"{path}.{name}" if path else str(name)
            yield from differences(stored.get(name), wanted.get(name), inner)
    elif stored != wanted:
        yield f"{path}: {json.dumps(stored)} there, {json.dumps(wanted)} here"


def settings_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two runs of one seed the same: settings, model and data. Not what is told of
    them: titles, sources, published results, where the data lies, which other seeds were asked
    for."""
    preset = identity["preset"]
    train = {name: value for name, value in preset["train"].items() if name != "seeds"}
    return {
        **{name: preset[name] for name in ("name", "task", "config", "eval")},
        "train": train,
        "model": identity["model"],
        "data": {name: source["sha256"] for name, source in identity["data"].items()},
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        **{name: _version(name) for name in _PACKAGES},
    }


def start_memory(device: torch.device) -> None:
    """Let the peak of CUDA memory begin here. A process's own peak cannot be set back."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, Any]:
    """The most memory so far, in bytes, and of what: tensors on the GPU, or the whole process."""
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": "tensors on the GPU"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return {"bytes": peak * (1 if sys.platform == "darwin" else 1024), "of": "the process"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _finite(value: Any) -> Any:
    """The same value with null for NaN and the infinities, which JSON does not know."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value
