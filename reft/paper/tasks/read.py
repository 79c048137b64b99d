"""Reading and checking of the records of a set, from a folder or from the hub."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from reft.io.hub_status import hub_reachable
from reft.paper.tasks import demos
from reft.paper.tasks.task import ClassificationTask, Record, Task
from reft.safe_read import is_text, parse_json, read_text, shown

_LLM_ADAPTERS = "https://github.com/AGI-Edgerunners/LLM-Adapters"


@dataclass(frozen=True)
class RecordSet:
    """Records, their source, and the SHA-256 of their canonical JSON, which does not depend on the
    file format."""

    records: tuple[Record, ...]
    source: str
    sha256: str


@dataclass(frozen=True)
class Origin:
    """Origin of a set: an address for messages, and (repository, configuration) on the hub if it is
    there."""

    address: str
    hub: tuple[str, str | None] | None = None


#: Set -> its origin, for sets that are not in LLM-Adapters' ``dataset`` folder or GLUE.
_ORIGINS: Mapping[str, Origin] = MappingProxyType(
    {
        "commonsense_170k": Origin(
            f"{_LLM_ADAPTERS}/blob/main/ft-training_set/commonsense_170k.json",
            ("zwhe99/commonsense_170k", None),
        ),
        "math_10k": Origin(
            f"{_LLM_ADAPTERS}/blob/main/ft-training_set/math_10k.json",
            ("lmms-lab/Math10K", None),
        ),
        "alpaca_data_cleaned": Origin(
            f"{_LLM_ADAPTERS}/blob/main/ft-training_set/alpaca_data_cleaned.json"
        ),
        "ultrafeedback": Origin(
            "https://github.com/frankaging/ultrafeedback-dataset (train.json, with Git LFS)"
        ),
        "hellaswag_de": Origin(
            "https://huggingface.co/datasets/LeoLM/HellaSwag_de", ("LeoLM/HellaSwag_de", None)
        ),
        "ultrafeedback_1k": Origin(
            "https://github.com/stanfordnlp/pyreft/blob/main/examples/composition/"
            "ultrafeedback_1k.json"
        ),
        "alpaca_eval": Origin(
            "https://huggingface.co/datasets/tatsu-lab/alpaca_eval",
            ("tatsu-lab/alpaca_eval", "alpaca_eval"),
        ),
    }
)
_GSM8K = Origin("https://huggingface.co/datasets/openai/gsm8k", ("openai/gsm8k", "main"))

#: Suffixes of data files in the order of the search.
_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")


def read_set(task: Task, name: str, split: str, data: Path | None) -> RecordSet:
    """Read the records of a set.

    Args:
        task: the task, which determines the required fields.
        name: name of the set, such as "boolq", "commonsense_170k" or "cola".
        split: "train", "test" or "validation".
        data: folder with the set in the layout of LLM-Adapters, of pyreft's script, as a file, or
            as saved by ``datasets``. None for the hub. Demos include their records.

    Raises:
        FileNotFoundError: the set was not found; the message has the searched paths, an example
            record and the origin of the set.
        ValueError: a record has another form; the message names the record and the field.
    """
    rows: list[Record] = []
    sources = []
    for part in name.split("+"):
        if (part, split) in demos.SETS:
            part_rows, source = demos.SETS[part, split](), f"{part} of reft.paper.tasks.demos"
        elif data is None:
            part_rows, source = _from_hub(task, part, split)
        else:
            part_rows, source = _from_folder(task, part, split, data)
        if not part_rows:
            raise ValueError(f"{source} holds no records")
        rows += _checked(task, part, source, part_rows)
        sources.append(source)
    return RecordSet(tuple(rows), " + ".join(sources), _hash(rows))


def origin_of(task: Task, name: str) -> Origin:
    """Return the origin of a set."""
    if isinstance(task, ClassificationTask):
        return Origin("https://huggingface.co/datasets/nyu-mll/glue", ("nyu-mll/glue", name))
    if name == "gsm8k" and task.train_set == "gsm8k":
        return _GSM8K
    return _ORIGINS.get(name, Origin(f"{_LLM_ADAPTERS}/tree/main/dataset/{name}"))


# -------------------------------------------------------------------- from a folder


def _from_folder(task: Task, name: str, split: str, data: Path) -> tuple[list[Record], str]:
    if not data.is_dir():
        raise FileNotFoundError(f"--data must be a folder with the sets of {task.name}, got {data}")
    candidates = list(_candidates(name, split, data))
    for path in candidates:
        if path.is_file():
            return _rows_of_file(path), str(path)
        if path.is_dir() and _is_saved(path):
            return _rows_of_saved(path, split), f"{path}, {split}"
    searched = ", ".join(_abbreviated(data, candidates))
    example = json.dumps(task.example, ensure_ascii=False)
    raise FileNotFoundError(
        f"no {split} records of {name!r} in {data}; searched {searched}. A record looks like "
        f"{example}; they come from {origin_of(task, name).address}"
    )


def _candidates(name: str, split: str, data: Path) -> Iterator[Path]:
    """Yield every path that a set may have."""
    roots = [data, data / "dataset", data / "datasets"]
    for root in roots:
        for suffix in _SUFFIXES:
            yield root / name / f"{split}{suffix}"
        yield root / name / split
        yield root / name
    if split == "train":
        roots.append(data / "ft-training_set")
    for root in roots:
        if split == "train" or root is not data / "ft-training_set":
            for suffix in _SUFFIXES:
                yield root / f"{name}{suffix}"


def _abbreviated(data: Path, candidates: list[Path]) -> Iterator[str]:
    """Yield the candidates for a message, one for all suffixes."""
    seen = set()
    for path in candidates:
        text = str(path.relative_to(data))
        if path.suffix in _SUFFIXES:
            text = text.removesuffix(path.suffix) + "{" + ",".join(_SUFFIXES) + "}"
        if text not in seen:
            seen.add(text)
            yield text


def _is_saved(folder: Path) -> bool:
    names = ("state.json", "dataset_dict.json")
    return any((folder / name).is_file() for name in names)


def _rows_of_saved(folder: Path, split: str) -> list[Record]:
    from datasets import DatasetDict, load_from_disk

    with _errors_with_path(folder):
        dataset = load_from_disk(str(folder))
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise FileNotFoundError(f"{folder} holds {', '.join(dataset)}, no split {split!r}")
        dataset = dataset[split]
    with _errors_with_path(folder):
        # In the Arrow format, files of image and audio columns are not opened.
        return _rows(dataset.with_format("arrow")[:])


def _rows_of_file(path: Path) -> list[Record]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        with _errors_with_path(path):
            return _rows(parquet.ParquetFile(path).read())
    if path.suffix == ".csv":
        # datasets is not used, because it converts the answers "true" and "false" to booleans.
        with _errors_with_path(path), path.open(encoding="utf-8-sig", newline="") as file:
            return [_labelled(dict(row)) for row in csv.DictReader(file)]
    text = read_text(path, "utf-8-sig")
    if text.startswith("version https://git-lfs.github.com/spec"):
        raise ValueError(
            f"{path} is a Git LFS pointer, not the data: install git-lfs and run `git lfs pull` in "
            "its repository"
        )
    try:
        if text.lstrip().startswith("["):
            rows: list[Record] = parse_json(text)
        else:
            rows = [parse_json(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(
            f"{path} must be a JSON list of records, or a record on each line: {error}"
        ) from None
    return rows


def _rows(table: Any) -> list[Record]:
    rows: list[Record] = table.to_pylist()
    return rows


@contextmanager
def _errors_with_path(path: Path) -> Iterator[None]:
    """Convert any error of another library's reader to a ValueError with the path."""
    try:
        yield
    except Exception as error:  # the readers do not document their errors
        raise ValueError(f"{path} cannot be read: {shown(str(error))}") from None


def _labelled(row: Record) -> Record:
    """Convert the label of a CSV row from text to a number."""
    label = row.get("label")
    if isinstance(label, str):
        for number in (int, float):
            try:
                return {**row, "label": number(label)}
            except ValueError:
                continue
    return row


# -------------------------------------------------------------------- from the hub


def _from_hub(task: Task, name: str, split: str) -> tuple[list[Record], str]:
    origin = origin_of(task, name)
    if origin.hub is None:
        raise FileNotFoundError(
            f"the set {name!r} is not on the hub: download it from {origin.address} and pass its "
            "folder with --data"
        )
    repository, configuration = origin.hub
    source = f"{repository}{f' ({configuration})' if configuration else ''} on the hub, {split}"
    if not hub_reachable():
        raise FileNotFoundError(
            f"the set {name!r} needs the hub, which cannot be reached; download it from "
            f"{origin.address} and pass its folder with --data"
        )
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        dataset = load_dataset(repository, configuration, split=split)
    except (OSError, ValueError, DatasetNotFoundError) as error:
        raise FileNotFoundError(f"cannot load {source}: {' '.join(str(error).split())}") from None
    return [dict(row) for row in dataset], source


# -------------------------------------------------------------------- checks


def _checked(task: Task, name: str, source: str, rows: list[Any]) -> Iterator[Record]:
    prepare = getattr(task, "prepare", {}).get(name)
    for number, row in enumerate(rows, start=1):
        where = f"{source}, record {number}"
        if prepare is not None:
            try:
                row = prepare(row)
            except (LookupError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{where} does not have the form of {name}: {shown(error)}"
                ) from None
        _check(task, where, row)
        yield row


def _check(task: Task, where: str, row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a record must be an object, got {type(row).__name__}")
    for field in task.fields:
        if field not in row:
            has = ", ".join(map(shown, list(row)[:10])) or "no field"
            raise ValueError(f"{where}: field {field!r} is missing, the record has {has}")
        if not is_text(row[field]):
            raise ValueError(f"{where}: field {field!r} must be text, got {shown(row[field])}")
    if isinstance(task, ClassificationTask):
        _check_label(task, where, row)
    try:
        _canonical(row)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: must be what JSON can hold, {shown(str(error))}") from None


def _check_label(task: ClassificationTask, where: str, row: Record) -> None:
    label = row.get("label")
    if not task.labels:
        # The bound excludes integers above the largest float.
        number = label if isinstance(label, (int, float)) and not isinstance(label, bool) else None
        if number is None or not abs(number) < 1e30:
            raise ValueError(f"{where}: field 'label' must be a number, got {shown(label)}")
        return
    if (
        not isinstance(label, int)
        or isinstance(label, bool)
        or label not in range(len(task.labels))
    ):
        hint = "; the test set of GLUE has no labels" if label == -1 else ""
        names = ", ".join(f"{number} ({word})" for number, word in enumerate(task.labels))
        raise ValueError(f"{where}: field 'label' must be one of {names}; got {shown(label)}{hint}")


def _canonical(row: Record) -> bytes:
    return json.dumps(row, sort_keys=True, ensure_ascii=False).encode()


def _hash(rows: list[Record]) -> str:
    total = hashlib.sha256()
    for row in rows:
        total.update(_canonical(row))
        total.update(b"\n")
    return total.hexdigest()
