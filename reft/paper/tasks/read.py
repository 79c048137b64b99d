"""Finding and checking the records of a set: in a folder of the user's, or on the hub."""

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
    """Records, where they came from, and the SHA-256 of their canonical JSON: of the same records
    in another form it is the same."""

    records: tuple[Record, ...]
    source: str
    sha256: str


@dataclass(frozen=True)
class Home:
    """Where a set comes from: an address to tell the user, and its name on the hub if it has one
    there, as (repository, configuration)."""

    address: str
    hub: tuple[str, str | None] | None = None


#: Sets that are not LLM-Adapters' and not GLUE's.
_HOMES: Mapping[str, Home] = MappingProxyType(
    {
        "commonsense_170k": Home(
            f"{_LLM_ADAPTERS}/blob/main/ft-training_set/commonsense_170k.json",
            ("zwhe99/commonsense_170k", None),
        ),
        "math_10k": Home(
            f"{_LLM_ADAPTERS}/blob/main/ft-training_set/math_10k.json",
            ("lmms-lab/Math10K", None),
        ),
        "alpaca_data_cleaned": Home(
            f"{_LLM_ADAPTERS}/blob/main/ft-training_set/alpaca_data_cleaned.json"
        ),
        "ultrafeedback": Home(
            "https://github.com/frankaging/ultrafeedback-dataset (train.json, with Git LFS)"
        ),
        "hellaswag_de": Home(
            "https://huggingface.co/datasets/LeoLM/HellaSwag_de", ("LeoLM/HellaSwag_de", None)
        ),
        "ultrafeedback_1k": Home(
            "https://github.com/stanfordnlp/pyreft/blob/main/examples/composition/"
            "ultrafeedback_1k.json"
        ),
        "alpaca_eval": Home(
            "https://huggingface.co/datasets/tatsu-lab/alpaca_eval",
            ("tatsu-lab/alpaca_eval", "alpaca_eval"),
        ),
    }
)
_GSM8K = Home("https://huggingface.co/datasets/openai/gsm8k", ("openai/gsm8k", "main"))

#: Endings of files that hold rows, in the order in which they are looked for.
_ENDINGS = (".json", ".jsonl", ".parquet", ".csv")


def read_set(task: Task, name: str, split: str, data: Path | None) -> RecordSet:
    """The records of a set.

    Args:
        task: whose set it is; says which fields a record needs.
        name: of the set: "boolq", "commonsense_170k", "cola".
        split: "train", "test", "validation".
        data: folder with the set as LLM-Adapters has it, as pyreft's script lays it out, as one
            file, or as ``datasets`` saves it. None for the hub; the demos bring their own.

    Raises:
        FileNotFoundError: it is not there; with the places, a record, and where to get it.
        ValueError: it is of another form, with the record and the field.
    """
    rows: list[Record] = []
    sources = []
    for part in name.split("+"):
        if (part, split) in demos.SETS:
            found, source = demos.SETS[part, split](), f"{part} of reft.paper.tasks.demos"
        elif data is None:
            found, source = _from_hub(task, part, split)
        else:
            found, source = _from_folder(task, part, split, data)
        if not found:
            raise ValueError(f"{source} holds no records")
        rows += _checked(task, part, source, found)
        sources.append(source)
    return RecordSet(tuple(rows), " + ".join(sources), _hash(rows))


def home(task: Task, name: str) -> Home:
    """Where a set comes from."""
    if isinstance(task, ClassificationTask):
        return Home("https://huggingface.co/datasets/nyu-mll/glue", ("nyu-mll/glue", name))
    if name == "gsm8k" and task.train_set == "gsm8k":
        return _GSM8K
    return _HOMES.get(name, Home(f"{_LLM_ADAPTERS}/tree/main/dataset/{name}"))


# -------------------------------------------------------------------- from a folder


def _from_folder(task: Task, name: str, split: str, data: Path) -> tuple[list[Record], str]:
    if not data.is_dir():
        raise FileNotFoundError(f"--data must be a folder with the sets of {task.name}, got {data}")
    places = list(_places(name, split, data))
    for place in places:
        if place.is_file():
            return _rows_of_file(place), str(place)
        if place.is_dir() and _is_saved(place):
            return _rows_of_saved(place, split), f"{place}, {split}"
    looked = ", ".join(_short(data, places))
    raise FileNotFoundError(
        f"no {split} records of {name!r} in {data}; looked for {looked}. A record looks like "
        f"{json.dumps(task.example, ensure_ascii=False)}; they come from {home(task, name).address}"
    )


def _places(name: str, split: str, data: Path) -> Iterator[Path]:
    """Every path at which a set may lie."""
    roots = [data, data / "dataset", data / "datasets"]
    for root in roots:
        for ending in _ENDINGS:
            yield root / name / f"{split}{ending}"
        yield root / name / split
        yield root / name
    if split == "train":
        roots.append(data / "ft-training_set")
    for root in roots:
        if split == "train" or root is not data / "ft-training_set":
            for ending in _ENDINGS:
                yield root / f"{name}{ending}"


def _short(data: Path, places: list[Path]) -> Iterator[str]:
    """The places as a user reads them: one for all endings."""
    seen = set()
    for place in places:
        shown = str(
            place.relative_to(data).with_suffix("" if place.suffix in _ENDINGS else place.suffix)
        )
        if place.suffix in _ENDINGS:
            shown += "{" + ",".join(_ENDINGS) + "}"
        if shown not in seen:
            seen.add(shown)
            yield shown


def _is_saved(folder: Path) -> bool:
    names = ("state.json", "dataset_dict.json")
    return any((folder / name).is_file() for name in names)


def _rows_of_saved(folder: Path, split: str) -> list[Record]:
    from datasets import DatasetDict, load_from_disk

    with _said(folder):
        found = load_from_disk(str(folder))
    if isinstance(found, DatasetDict):
        if split not in found:
            raise FileNotFoundError(f"{folder} holds {', '.join(found)}, no split {split!r}")
        found = found[split]
    with _said(folder):
        # As Arrow: a column of pictures or sounds is never opened, wherever its paths point.
        return _rows(found.with_format("arrow")[:])


def _rows_of_file(path: Path) -> list[Record]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        with _said(path):
            return _rows(parquet.ParquetFile(path).read())
    if path.suffix == ".csv":
        # Not datasets: it would make true and false of the answers "true" and "false".
        with _said(path), path.open(encoding="utf-8-sig", newline="") as file:
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
            f"{path} must be a JSON list of records, or one record a line: {error}"
        ) from None
    return rows


def _rows(table: Any) -> list[Record]:
    rows: list[Record] = table.to_pylist()
    return rows


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """What a reader of another library says of a damaged file, as a ValueError with the path."""
    try:
        yield
    except Exception as error:  # nobody has listed them
        raise ValueError(f"{path} cannot be read: {shown(str(error))}") from None


def _labelled(row: Record) -> Record:
    """A row of a CSV file, all text, with its label as a number."""
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
    where = home(task, name)
    if where.hub is None:
        raise FileNotFoundError(
            f"the set {name!r} is not on the hub: get it from {where.address} and name its folder "
            "with --data"
        )
    repository, configuration = where.hub
    source = f"{repository}{f' ({configuration})' if configuration else ''} on the hub, {split}"
    if not hub_reachable():
        raise FileNotFoundError(
            f"the set {name!r} is wanted from the hub, which cannot be reached; it is at "
            f"{where.address}: name a folder that holds it with --data"
        )
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        found = load_dataset(repository, configuration, split=split)
    except (OSError, ValueError, DatasetNotFoundError) as error:
        raise FileNotFoundError(f"cannot load {source}: {' '.join(str(error).split())}") from None
    return [dict(row) for row in found], source


# -------------------------------------------------------------------- checks


def _checked(task: Task, name: str, source: str, rows: list[Any]) -> Iterator[Record]:
    prepare = getattr(task, "prepare", {}).get(name)
    for number, row in enumerate(rows, start=1):
        place = f"{source}, record {number}"
        if prepare is not None:
            try:
                row = prepare(row)
            except (LookupError, TypeError, ValueError) as error:
                raise ValueError(f"{place} is not of the form of {name}: {shown(error)}") from None
        _check(task, place, row)
        yield row


def _check(task: Task, place: str, row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a record must be an object, got {type(row).__name__}")
    for field in task.fields:
        if field not in row:
            has = ", ".join(map(shown, list(row)[:10])) or "no field"
            raise ValueError(f"{place}: field {field!r} is missing, the record has {has}")
        if not is_text(row[field]):
            raise ValueError(f"{place}: field {field!r} must be text, got {shown(row[field])}")
    if isinstance(task, ClassificationTask):
        _check_label(task, place, row)
    try:
        _canonical(row)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{place}: must be what JSON can hold, {shown(str(error))}") from None


def _check_label(task: ClassificationTask, place: str, row: Record) -> None:
    label = row.get("label")
    if not task.labels:
        # Nor an integer beyond every float.
        number = label if isinstance(label, (int, float)) and not isinstance(label, bool) else None
        if number is None or not abs(number) < 1e30:
            raise ValueError(f"{place}: field 'label' must be a number, got {shown(label)}")
        return
    if (
        not isinstance(label, int)
        or isinstance(label, bool)
        or label not in range(len(task.labels))
    ):
        hint = "; the test set of GLUE has no labels" if label == -1 else ""
        names = ", ".join(f"{at} ({one})" for at, one in enumerate(task.labels))
        raise ValueError(f"{place}: field 'label' must be one of {names}; got {shown(label)}{hint}")


def _canonical(row: Record) -> bytes:
    return json.dumps(row, sort_keys=True, ensure_ascii=False).encode()


def _hash(rows: list[Record]) -> str:
    total = hashlib.sha256()
    for row in rows:
        total.update(_canonical(row))
        total.update(b"\n")
    return total.hexdigest()
