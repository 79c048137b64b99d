"""Files of a run: ``run.json`` is written at its start, ``result.json`` at its end.

``run.json`` identifies the run: the resolved preset, the model, the seed and the hashes of the
data. A run is resumed only if all of them are equal. ``result.json`` adds the results. Both files
are written atomically.
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

from reft.field_checks import is_integer
from reft.io.atomic_write import write_whole
from reft.safe_read import parse_json, read_text, shown

RUN_FILE = "run.json"
RESULT_FILE = "result.json"

#: Format of both files.
FORMAT_VERSION = 1

#: Path of a required value in a result -> its types.
_REQUIRED: Mapping[str, tuple[type, ...]] = {
    "preset": (dict,),
    "preset.name": (str,),
    "preset.task": (str,),
    "preset.config": (dict,),
    "preset.train": (dict,),
    "preset.eval": (dict,),
    "model": (str,),
    "seed": (int,),
    "dtype": (str,),
    "data": (dict,),
    "scores": (dict,),
    "parameters.percent": (int, float),
    "training.curve": (list,),
    "training.steps": (int,),
    "training.seconds": (int, float),
    "training.tokens_per_second": (int, float),
    "training.memory.bytes": (int, float),
    "training.memory.of": (str,),
}

_PACKAGES = ("reft", "torch", "triton", "transformers", "accelerate", "datasets", "tokenizers")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON atomically. NaN is written as null."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(target, text + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read ``run.json`` or ``result.json``.

    Raises:
        ValueError: the file is not a JSON object, or has another format.
    """
    file = Path(path)
    try:
        value: dict[str, Any] = parse_json(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
    version = value.get("format_version") if isinstance(value, dict) else None
    if not is_integer(version) or version != FORMAT_VERSION:
        newer = is_integer(version) and version > FORMAT_VERSION
        raise ValueError(
            f"{file}: format_version of a run must be {FORMAT_VERSION}, got "
            f"{shown(version) if isinstance(value, dict) else type(value).__name__}"
            + ("; a newer version of reft wrote it, upgrade reft to read it" if newer else "")
        )
    return value


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check a ``result.json``.

    Raises:
        ValueError: see :func:`read_json`, or a value is missing or has another type.
    """
    value = read_json(path)
    for name, kinds in _REQUIRED.items():
        part: Any = value
        for key in name.split("."):
            part = part.get(key) if isinstance(part, Mapping) else None
        if not isinstance(part, kinds) or isinstance(part, bool):
            raise ValueError(f"{path} is not the result of a run: {name} is {shown(part)}")
    curve, scores = value["training"]["curve"], value["scores"]
    rows = all(
        isinstance(row, Mapping) and _is_number(row.get("step")) and _is_loss(row.get("loss"))
        for row in curve
    )
    if not rows or not all(_is_loss(score) for score in scores.values()):
        raise ValueError(f"{path} is not the result of a run: its curve and scores must be numbers")
    sources = value["data"].values()
    if not all(isinstance(source, Mapping) and "sha256" in source for source in sources):
        raise ValueError(f"{path} is not the result of a run: data has no hashes")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_loss(value: Any) -> bool:
    """Whether a value is a number, or null for NaN."""
    return value is None or _is_number(value)


def differences(stored: Any, expected: Any, path: str = "") -> Iterator[str]:
    """Describe the differences of two JSON values: ``train.epochs: 6 there, 3 here``."""
    if isinstance(stored, Mapping) and isinstance(expected, Mapping):
        for name in dict.fromkeys([*stored, *expected]):
            inner = f"{path}.{name}" if path else str(name)
            yield from differences(stored.get(name), expected.get(name), inner)
    elif stored != expected:
        yield f"{path}: {json.dumps(stored)} there, {json.dumps(expected)} here"


def settings_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, model and data hashes that determine a run apart from its seed.

    Titles, sources, published results, the folder of the data and other seeds are left out.
    """
    preset = identity["preset"]
    train = {name: value for name, value in preset["train"].items() if name != "seeds"}
    return {
        **{name: preset[name] for name in ("name", "task", "config", "eval")},
        "train": train,
        "model": identity["model"],
        "data": {name: source["sha256"] for name, source in identity["data"].items()},
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions of packages and the machine."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        **{name: _version(name) for name in _PACKAGES},
    }


def start_memory(device: torch.device) -> None:
    """Reset the peak of CUDA memory. The peak of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Return the peak memory in bytes, of the tensors on the GPU or of the whole process."""
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
    """Replace NaN and infinities by None, because JSON has neither."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
