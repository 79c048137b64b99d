"""Fuzz targets: an untrusted file is read, or refused with an allowed error.

    python tests/security/fuzz.py adapter -max_total_time=60    # libFuzzer's options; `make fuzz`

Each target writes its input bytes to files and reads them with the library. A successful read is
checked. The table at the end has the allowed errors; any other error is a finding, and becomes a
case of ``test_fuzz.py``.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
    import atheris

    _instrumented = atheris.instrument_imports(include=["reft"])
else:
    _instrumented = nullcontext()

import torch
from safetensors.torch import save

with _instrumented:
    from reft.adapter.host_adapter import host_adapter
    from reft.adapter.parameters import AdapterParameters
    from reft.config import ReftConfig
    from reft.interop.folders import read_reft
    from reft.interop.from_adapters import read_adapters
    from reft.interop.from_pyreft import FIELDS, read_pyreft
    from reft.io.adapter_files import METADATA_KEY, WEIGHTS_FILE, read_adapter
    from reft.paper import presets
    from reft.paper.presets.load import read as read_preset
    from reft.paper.runs.result import read_result
    from reft.paper.tasks import get_task
    from reft.paper.tasks.read import read_set
    from reft.positions import parse_positions
    from reft.train.records import TEXT_LABEL, read_records

#: Separator between the parts of an input, such as several files or header and data.
SEPARATOR = b"\0--\0"
DIM, BLOCKS = 8, 3

_folder = tempfile.TemporaryDirectory(prefix="reft-fuzz-")
_HERE = Path(_folder.name)


def _split(data: bytes) -> tuple[bytes, bytes]:
    first, _, second = data.partition(SEPARATOR)
    return first, second


def _text(data: bytes) -> str:
    # Lone surrogates too, which JSON may escape and a Python string may hold.
    return data.decode("utf-8", errors="surrogateescape")


def config(data: bytes) -> None:
    """A configuration in JSON; a read configuration is written and read again."""
    read = ReftConfig.from_json(_text(data))
    assert ReftConfig.from_json(read.to_json().encode().decode()) == read
    read.resolve_layers(BLOCKS)
    assert read.num_groups >= 1


def positions(data: bytes) -> None:
    """The position grammar; parsed positions are formatted to the same text."""
    text = _text(data)
    read = parse_positions(text)
    assert str(read) == text and 1 <= read.num_groups(tied=False, untied_by="position") < 2_000_000


def adapter(data: bytes) -> None:
    """A safetensors file: its header and its data, whose length is always right."""
    header, body = _split(data)
    (_HERE / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(header)) + header + body)
    read, tensors = read_adapter(_HERE)
    loaded = host_adapter(read, tensors, num_layers=BLOCKS, dim=DIM)
    assert all(layer.bias.isfinite().all() for layer in loaded.weights)
    assert all(layer.decode.isfinite().all() for layer in loaded.weights)
    assert read_reft(_HERE).config == read


def _pickled(file: Path, pickle: bytes) -> None:
    """Make a torch.save file with this pickle and three tensors: R or a part of I, W, b."""
    wide = DIM if b"parametrizations" in pickle else 2
    tensors = (torch.eye(DIM, 2), torch.eye(wide, DIM), torch.zeros(2))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        for number, tensor in enumerate(tensors):
            archive.writestr(f"archive/data/{number}", tensor.numpy().tobytes())


def pyreft(data: bytes) -> None:
    """A folder of pyreft: its config.json and the pickle in its file."""
    described, pickle = _split(data)
    folder = _HERE / "pyreft"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(described)
    _pickled(folder / f"intkey_{_KEY}.bin", pickle)
    assert len(read_pyreft(folder, positions="l1").config.layers) == 1


def adapters(data: bytes) -> None:
    """A folder of adapters: its adapter_config.json and the pickle in its file."""
    described, pickle = _split(data)
    folder = _HERE / "adapters"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(described)
    _pickled(folder / "pytorch_adapter.bin", pickle)
    assert len(read_adapters(folder, intervention="noreft").config.layers) == 1


def preset(data: bytes) -> None:
    """A preset in TOML; a read preset is written and read again."""
    file = _HERE / "preset.toml"
    file.write_bytes(data)
    read = read_preset(file)
    assert ".." not in Path(read.name).parts and not Path(read.name).is_absolute()
    file.write_text(presets.to_toml(read), encoding="utf-8")
    # Except the changed status: a file may have no preset that it is a copy of.
    assert read_preset(file).to_dict() | {"provenance": 0} == read.to_dict() | {"provenance": 0}


def records(data: bytes) -> None:
    """A data file of ``reft train``, and the same bytes as a set of two tasks."""
    (_HERE / "cola").mkdir(exist_ok=True)
    (_HERE / "hellaswag_de").mkdir(exist_ok=True)
    ways: list[tuple[str, Callable[[Path], object]]] = [
        ("train.jsonl", lambda file: read_records(file)),
        ("train.jsonl", lambda file: read_records(file, required=TEXT_LABEL)),
        ("cola/train.json", lambda _: read_set(get_task("glue/cola"), "cola", "train", _HERE)),
        (
            "hellaswag_de/train.csv",
            lambda _: read_set(get_task("composition"), "hellaswag_de", "train", _HERE),
        ),
    ]
    reasons: list[ValueError] = []
    for name, way in ways:
        (_HERE / name).write_bytes(data)
        try:
            way(_HERE / name)
        except ValueError as error:
            reasons.append(error)
    if len(reasons) == len(ways):
        raise reasons[-2]


def result(data: bytes) -> None:
    """A result.json of a run."""
    file = _HERE / "result.json"
    file.write_bytes(data)
    read = read_result(file)
    assert isinstance(read["scores"], dict)


# -------------------------------------------------------------------- seeds

_KEY = "layer_1_comp_block_output_unit_pos_nunit_1#0"


def _saved(**tensors: torch.Tensor) -> bytes:
    """Return the pickle inside a torch.save file."""
    file = io.BytesIO()
    torch.save(tensors, file)
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        return archive.read(name)


def _configs() -> list[bytes]:
    varied = (
        {},
        {"layers": [0, -1], "positions": "f2", "tied": False, "untied_by": "position"},
        {"subspaces": {"one": [0, 1], "two": [2]}, "activation": "gelu", "dropout": 0.1},
        {"modules_to_save": ["score"], "task_type": "SEQ_CLS", "block_path": "model.layers"},
        {"component": "module:mlp.down_proj", "init": "identity", "dtype": "bfloat16"},
    )
    return [ReftConfig(**{"rank": 3, **fields}).to_json().encode() for fields in varied]


def _adapters_of_ours() -> list[bytes]:
    seeds = []
    for changes in ({}, {"intervention": "noreft"}, {"intervention": "consreft", "tied": False}):
        config = ReftConfig(**{"rank": 2, "layers": [0, 2], **changes})
        rng = torch.Generator().manual_seed(0)
        bank = AdapterParameters(config, config.resolve_layers(BLOCKS), DIM, generator=rng)
        tensors = bank.training_state() if not changes else bank.export_state_dict()
        content = save(tensors, metadata={"format": "pt", METADATA_KEY: config.to_json()})
        size = struct.unpack("<Q", content[:8])[0]
        seeds.append(content[8 : 8 + size] + SEPARATOR + content[8 + size :])
    return seeds


def _folders_of_pyreft() -> list[bytes]:
    row = [{"layer": 1, "component": "block_output", "unit": "pos"}.get(field) for field in FIELDS]
    kind = "<class 'pyreft.interventions.{}'>"
    seeds = []
    orthogonal = "rotate_layer.parametrizations.weight."
    r, w, b = torch.zeros(DIM, 2), torch.zeros(2, DIM), torch.zeros(2)
    for name, tensors in (
        ("Noreft", {"proj_layer.weight": r.view(2, DIM), "learned_source.weight": w}),
        ("Loreft", {"rotate_layer": r, "weight": w}),
        ("Consreft", {f"{orthogonal}original": r, f"{orthogonal}0.base": torch.zeros(DIM, DIM)}),
    ):
        described = {
            "sorted_keys": [_KEY],
            "representations": [row],
            "intervention_types": [kind.format(f"{name}Intervention")],
        }
        biases = {"Noreft": "learned_source.bias", "Loreft": "bias", "Consreft": "learned_source"}
        pickle = _saved(**tensors, **{biases[name]: b})
        seeds.append(json.dumps(described).encode() + SEPARATOR + pickle)
    return seeds


def _folders_of_adapters() -> list[bytes]:
    described = {
        "config": {
            "architecture": "reft", "prefix_positions": 3, "suffix_positions": 0,
            "non_linearity": None, "dropout": 0.05, "tied_weights": False,
        },
        "model_name": "a",
    }  # fmt: skip
    unit = "model.layers.1.reft_layer.refts.a.units.0."
    pickle = _saved(
        **{
            f"{unit}{part}.weight": torch.zeros(2, DIM) for part in ("learned_source", "projection")
        },
        **{f"{unit}learned_source.bias": torch.zeros(2)},
    )
    return [json.dumps(described).encode() + SEPARATOR + pickle]


def _presets() -> list[bytes]:
    names = ("commonsense/llama-7b/loreft", "glue/roberta-base/stsb/direft", "composition/llama-7b")
    return [presets.to_toml(presets.load(name)).encode() for name in names]


def _records() -> list[bytes]:
    return [
        b'{"prompt": "a", "completion": "b"}\n\n{"prompt": "\\u00e9", "completion": ""}\n',
        b'\xef\xbb\xbf[{"text": "a", "label": 1}]',
        b'[{"sentence": "a", "label": 1, "idx": 0}, {"sentence": "b", "label": 0}]',
        b'ctx,endings_de,label\n"a","[""x"", ""y""]",1\n',
    ]


def _results() -> list[bytes]:
    result = {
        "format_version": 1,
        "preset": presets.load("memorisation/llama-7b").to_dict(),
        "model": "m", "seed": 42, "dtype": "bfloat16",
        "data": {"train": {"source": "here", "sha256": "ab", "records": 3}},
        "parameters": {"percent": 0.03},
        "training": {
            "steps": 7, "seconds": 1.5, "tokens_per_second": 100.0,
            "memory": {"bytes": 3, "of": "the process"}, "curve": [{"step": 1, "loss": 2.0}],
        },
        "scores": {"memorisation": 50.0, "average": None},
    }  # fmt: skip
    return [json.dumps(result).encode()]


@dataclass(frozen=True)
class Target:
    """A fuzz target: the function, its seed inputs, and the errors that it may raise."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    allowed: tuple[type[Exception], ...] = (ValueError,)


TARGETS = {
    "config": Target(config, _configs),
    "positions": Target(positions, lambda: [b"f7+l7", b"l1", b"prompt+g4", b"all", b"given"]),
    "adapter": Target(adapter, _adapters_of_ours, (ValueError, FileNotFoundError)),
    "pyreft": Target(pyreft, _folders_of_pyreft),
    "adapters": Target(adapters, _folders_of_adapters, (ValueError, FileNotFoundError)),
    "preset": Target(preset, _presets),
    "records": Target(records, _records),
    "result": Target(result, _results),
}


def attempt(name: str, data: bytes) -> bool:
    """Run a target once and return whether the input was read, not refused."""
    target = TARGETS[name]
    try:
        target.run(data)
    except target.allowed:
        return False
    return True


def main(name: str, options: list[str]) -> None:
    """Fuzz a target from its seeds and the corpus folders in the options."""
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(TARGETS[name].seeds()):
            assert attempt(name, seed), f"seed {number} of {name} is refused"
            (Path(corpus) / str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], *options, corpus], lambda data: attempt(name, data))
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
