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

from reft.io.atomic_write import write_whole
from reft.safe_read import parse_json, read_text, shown

RUN_FILE = "run.json"
RESULT_FILE = "result.json"

#: Of the stored form.
FORMAT_VERSION = 1

#: What is read of a result, by its path in it -> the types it may have.
_PARTS: Mapping[str, tuple[type, ...]] = {
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
    """Write indented JSON, replacing the file in one step. NaN is written as null."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(target, text + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read one of the two files.

    Raises:
        ValueError: not JSON, not an object, or of a newer format.
    """
    file = Path(path)
    try:
        value: dict[str, Any] = parse_json(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
    found = value.get("format_version") if isinstance(value, dict) else None
    if type(found) is not int or not 1 <= found <= FORMAT_VERSION:
        newer = type(found) is int and found > FORMAT_VERSION
        raise ValueError(
            f"{file}: format_version of a run must be a number from 1 to {FORMAT_VERSION}, got "
            f"{shown(found) if isinstance(value, dict) else type(value).__name__}"
            + ("; a newer version of reft wrote it, upgrade reft to read it" if newer else "")
        )
    return value


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a ``result.json`` of which the numbers will be shown.

    Raises:
        ValueError: as :func:`read_json`, or a part that a run writes is missing or of another type.
    """
    value = read_json(path)
    for name, kinds in _PARTS.items():
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
    if not rows or not all(_is_loss(one) for one in scores.values()):
        raise ValueError(f"{path} is not the result of a run: its curve or scores are no numbers")
    if not all(isinstance(one, Mapping) and "sha256" in one for one in value["data"].values()):
        raise ValueError(f"{path} is not the result of a run: data has no hashes")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_loss(value: Any) -> bool:
    """A number, or null for NaN."""
    return value is None or _is_number(value)


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
