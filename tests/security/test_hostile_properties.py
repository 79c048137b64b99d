"""Property tests: arbitrary input is read correctly, or refused with a ValueError.

The examples are the same in every run.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import fuzz
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from payloads import put
from safetensors.torch import save

from reft import ReftConfig
from reft.adapter.host_adapter import host_adapter
from reft.io.adapter_files import WEIGHTS_FILE, read_adapter
from reft.paper import presets
from reft.paper.presets.load import read as read_preset
from reft.positions import parse_positions
from reft.train.records import read_records

FIXED = settings(derandomize=True, deadline=None, database=None, max_examples=150)

TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # half characters too
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(-(10**30), 10**30) | st.floats() | TEXT
)
JSON = st.recursive(
    SCALARS, lambda value: st.lists(value, max_size=4) | st.dictionaries(TEXT, value, max_size=4),
    max_leaves=8,
)  # fmt: skip
FIELDS = sorted(ReftConfig().to_dict())


@FIXED
@given(st.dictionaries(st.sampled_from(FIELDS) | TEXT, JSON, max_size=3))
def test_any_object_as_a_configuration(values: dict[str, Any]):
    try:
        read = ReftConfig.from_dict(values)
    except ValueError as error:
        said = str(error)
        assert any(name in said for name in values) or "has no field" in said
        assert len(said) < 2000
    else:
        assert ReftConfig.from_json(read.to_json().encode().decode()) == read
        assert values.keys() <= set(FIELDS)


@FIXED
@given(st.sampled_from(FIELDS), JSON)
def test_any_value_of_one_field(name: str, value: Any):
    """A value is refused with the same message in a dictionary and in JSON."""
    answers = []
    for read in (
        lambda: ReftConfig.from_dict({name: value}),
        lambda: ReftConfig.from_json(json.dumps({name: value})),
    ):
        try:
            answers.append(read())
        except ValueError as error:
            assert name in str(error)
            answers.append(str(error))
    assert answers[0] == answers[1]


@FIXED
@given(JSON)
def test_any_json_as_a_configuration(value: Any):
    try:
        assert isinstance(ReftConfig.from_json(json.dumps(value)), ReftConfig)
    except ValueError as error:
        assert "ReftConfig" in str(error)


@FIXED
@given(TEXT)
def test_any_text_as_json(text: str):
    try:
        assert isinstance(ReftConfig.from_json(text), ReftConfig)
    except ValueError as error:
        assert "ReftConfig" in str(error)


NUMBERS = st.integers(0, 2_000_000).map(str) | TEXT
GRAMMAR = st.lists(
    st.sampled_from(["f", "l", "+", "prompt", "+g", "all", "given", "image", " ", "-", "٣"])
    | NUMBERS,
    max_size=6,
).map("".join)


@settings(FIXED, max_examples=600)
@given(GRAMMAR | TEXT | SCALARS)
def test_any_text_as_positions(text: Any):
    try:
        read = parse_positions(text)
    except ValueError as error:
        assert "positions must be" in str(error) and len(str(error)) < 600
    else:
        assert str(read) == text
        assert max(read.first, read.last, read.generated) < 10**6


@FIXED
@given(st.integers(1, 999_999), st.integers(1, 999_999))
def test_all_positions_of_the_grammar(first: int, last: int):
    for text in (f"f{first}+l{last}", f"f{first}", f"l{last}", f"prompt+g{first}"):
        assert str(parse_positions(text)) == text


# -------------------------------------------------------------------- adapter files

HEADER, BODY = fuzz.TARGETS["adapter"].seeds()[1].split(fuzz.SEPARATOR)
NAMES = st.sampled_from(
    ["rotation", "weight", "bias", "rotation.free", "rotation.base", "heads.lm_head.weight", "x"]
)
DTYPES = st.sampled_from([
    "BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "I16", "F16", "BF16", "I32", "F32", "F64", "I64",
    "C64",
])  # fmt: skip


@FIXED
@given(st.data())
def test_a_valid_file_with_another_header(data: st.DataObject):
    """Change names, dtypes, shapes, offsets and the configuration."""
    header = json.loads(HEADER)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from([name for name in header if name != "__metadata__"]))
        what = data.draw(st.sampled_from(["name", "dtype", "shape", "offsets", "gone", "config"]))
        if what == "name":
            header[data.draw(NAMES)] = header.pop(name)
        elif what == "dtype":
            header[name] = {**header[name], "dtype": data.draw(DTYPES)}
        elif what == "shape":
            shape = data.draw(st.lists(st.integers(-1, 9) | st.integers(), max_size=5))
            header[name] = {**header[name], "shape": shape}
        elif what == "offsets":
            offsets = data.draw(st.lists(st.integers(0, len(BODY)) | st.integers(), max_size=3))
            header[name] = {**header[name], "data_offsets": offsets}
        elif what == "config":
            stored_config = json.loads(HEADER)["__metadata__"]["reft_config"]
            values = json.loads(stored_config) | data.draw(
                st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=1)
            )
            header["__metadata__"] = {"reft_config": json.dumps(values)}
        elif len(header) > 2:
            del header[name]
    fuzz.attempt("adapter", json.dumps(header).encode() + fuzz.SEPARATOR + BODY)


@FIXED
@given(st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_valid_file_with_other_bytes(changes: list[tuple[int, int]]):
    content = bytearray(HEADER + fuzz.SEPARATOR + BODY)
    for at, value in changes:
        content[at % len(content)] = value
    fuzz.attempt("adapter", bytes(content))


@FIXED
@given(st.integers(0), st.floats(width=32) | st.sampled_from([float("nan"), float("inf"), 3e38]))
def test_any_number_in_a_tensor(tmp_path_factory, at: int, number: float):
    """Read tensors are finite, and R has orthonormal rows."""
    config = ReftConfig(rank=2, layers=[0])
    tensors = {
        "rotation": torch.eye(8)[:2].view(1, 1, 2, 8).clone(),
        "weight": torch.zeros(1, 1, 2, 8),
        "bias": torch.zeros(1, 1, 2),
    }
    name = sorted(tensors)[at % 3]
    flat = tensors[name].view(-1)
    flat[at % len(flat)] = number
    folder = put(tmp_path_factory.mktemp("a"), config, tensors)
    finite = torch.tensor(number).isfinite().item()
    frame = torch.dist(tensors["rotation"][0, 0] @ tensors["rotation"][0, 0].T, torch.eye(2)) < 1e-4
    try:
        host_adapter(*read_adapter(folder), num_layers=1, dim=8)
    except ValueError as error:
        assert (not finite and f"{name} must be finite" in str(error)) or not frame
    else:
        assert finite


def test_the_header_that_is_changed_is_one():
    assert fuzz.attempt("adapter", HEADER + fuzz.SEPARATOR + BODY)
    content = save({"x": torch.zeros(1)})
    assert struct.unpack("<Q", content[:8])[0] < len(content)
    assert WEIGHTS_FILE.endswith(".safetensors")


# -------------------------------------------------------------------- presets, data files

PRESET = presets.to_toml(presets.load("glue/roberta-base/cola/loreft"))
VALUES = st.sampled_from([
    "nan", "inf", "-1", "0", "true", '""', "[]", "{}", "[[[]]]", "1e400", "9" * 400, '"../x"',
    "1979-05-27", '"\\uD800"', '"\\u0000"', "[1, 1]", "'''x'''", "0x10",
])  # fmt: skip


@FIXED
@given(st.integers(0), st.integers(0), VALUES | TEXT)
def test_a_preset_with_other_lines(tmp_path_factory, first: int, second: int, value: str):
    """Change a value and remove a line: the file is read, or refused with its path."""
    lines = PRESET.splitlines()
    settings_at = [at for at, line in enumerate(lines) if " = " in line and line[:1] != "#"]
    at = settings_at[first % len(settings_at)]
    lines[at] = lines[at].partition(" = ")[0] + " = " + value
    lines[second % len(lines)] = ""
    file = tmp_path_factory.mktemp("p") / "x.toml"
    file.write_bytes("\n".join(lines).encode("utf-8", errors="surrogatepass"))
    try:
        read = read_preset(file)
    except ValueError as error:
        assert str(file) in str(error) and len(str(error)) < 3000
    else:
        file.write_text(presets.to_toml(read), encoding="utf-8")
        assert read_preset(file).to_dict().keys() == read.to_dict().keys()


@FIXED
@given(st.lists(st.dictionaries(st.sampled_from(["prompt", "completion", "x"]), JSON), max_size=3))
@pytest.mark.parametrize("lines", [True, False])
def test_any_records(tmp_path_factory, lines: bool, rows: list[dict[str, Any]]):
    file = tmp_path_factory.mktemp("r") / "data.json"
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    file.write_text(text)
    good = bool(rows) and all(
        row.keys() == {"prompt", "completion"} and all(isinstance(v, str) for v in row.values())
        for row in rows
    )
    try:
        assert read_records(file) == rows and good
    except ValueError as error:
        assert str(file) in str(error)
        assert not good or "unpaired surrogate" in str(error)
