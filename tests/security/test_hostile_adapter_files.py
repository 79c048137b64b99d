"""Hostile adapters through every loading function: refused with the reason, without changes."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from payloads import Harmful, entry, put, with_header
from safetensors.torch import load_file, save, save_file
from tiny_models import DIM, LAYERS, bert, gpt2, llama, tokens
from witnesses import assert_same, files_of, nothing_happens, state_of

from reft import ReftConfig, ReftModel, get_reft_model
from reft.io.adapter_files import CONFIG_FILE, METADATA_KEY, WEIGHTS_FILE
from reft.serving.vllm.resolver import Resolver
from reft.serving.vllm.settings import Settings

CONFIG = ReftConfig(rank=3, positions="f2+l2")
NAN, INF = float("nan"), float("inf")


def tensors(**changes) -> dict[str, torch.Tensor]:
    """Make the tensors of :data:`CONFIG` on the tiny Llama with changes; None removes a tensor."""
    good = {
        "rotation": torch.eye(DIM)[:3].expand(LAYERS, 1, 3, DIM).contiguous(),
        "weight": torch.zeros(LAYERS, 1, 3, DIM),
        "bias": torch.zeros(LAYERS, 1, 3),
    }
    return {name: tensor for name, tensor in {**good, **changes}.items() if tensor is not None}


def one_of(value: float, shape: tuple[int, ...], dtype=torch.float32) -> torch.Tensor:
    """Make zeros with this number in the middle."""
    tensor = torch.zeros(shape, dtype=dtype)
    tensor.view(-1)[tensor.numel() // 2] = value
    return tensor


def changed(**fields) -> dict:
    return {**CONFIG.to_dict(), **fields}


def folder(config=CONFIG, **values) -> Callable[[Path], Path]:
    return lambda path: put(path, config, tensors(**values))


def raw(content: bytes, beside: str | None = None) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        put(path, CONFIG, tensors())
        (path / WEIGHTS_FILE).write_bytes(content)
        if beside is not None:
            (path / CONFIG_FILE).write_text(beside)
        return path

    return make


def pipe(name: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        put(path, CONFIG, tensors())
        (path / name).unlink()
        os.mkfifo(path / name)
        return path

    return make


def directory(path: Path) -> Path:
    (path / WEIGHTS_FILE).mkdir(parents=True)
    return path


def pickled(path: Path) -> Path:
    put(path, CONFIG, tensors())
    (path / WEIGHTS_FILE).write_bytes(pickle.dumps(Harmful()))
    return path


def saved_by_torch(path: Path) -> Path:
    put(path, CONFIG, tensors())
    torch.save({"rotation": Harmful()}, path / WEIGHTS_FILE)
    return path


def dangling(path: Path) -> Path:
    put(path, CONFIG, tensors())
    (path / WEIGHTS_FILE).unlink()
    (path / WEIGHTS_FILE).symlink_to("/nowhere/else")
    return path


R, W, B = (LAYERS, 1, 3, DIM), (LAYERS, 1, 3, DIM), (LAYERS, 1, 3)
DEEP = "[" * 100_000
A = entry("F32", [4], 0, 16)
TWICE = json.dumps({"a": A})[:-1] + ", " + json.dumps({"a": A})[1:]

#: File -> (how it is made, text of the error)
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    # ------------------------------------------------------------ missing files
    "nothing": (raw(b""), "is truncated or not a safetensors file"),
    "pickle": (pickled, "is truncated or not a safetensors file"),
    "torch.save": (saved_by_torch, "is truncated or not a safetensors file"),
    "a folder": (directory, "must be a plain file, it is a folder, a pipe"),
    "a pipe": (pipe(WEIGHTS_FILE), "must be a plain file, it is a folder, a pipe"),
    "a link to nowhere": (dangling, rf"it has no {WEIGHTS_FILE}"),
    # ------------------------------------------------------------ header
    "a header of 2^63": (raw(struct.pack("<Q", 1 << 63) + b"{}"), "bytes, got 9223372036854775808"),
    "a header of 100 MB": (raw(struct.pack("<Q", 10**8) + b"{}"), "bytes, got 100000000"),
    "a longer header": (raw(struct.pack("<Q", 1000) + b"{}"), "is truncated"),
    "a deep header": (raw(with_header(DEEP.encode())), "nested too deep"),
    "a deep value": (raw(with_header(b'{"a":' * 50_000)), "nested too deep"),
    "a header of no object": (raw(with_header([1])), "is truncated or not"),
    "a name twice": (raw(with_header(TWICE.encode(), bytes(16))), "duplicate key 'a'"),
    "not UTF-8": (raw(with_header(b'{"\xff": 1}')), "is truncated or not"),
    "overlapping": (raw(with_header({"a": A, "b": A}, bytes(16))), "invalid offset"),
    "a gap": (raw(with_header({"a": entry("F32", [2], 8, 16)}, bytes(16))), "invalid offset"),
    "beyond the end": (raw(with_header({"a": entry("F32", [40], 0, 160)}, bytes(16))), "is trunc"),
    "bytes that nobody names": (raw(with_header({"a": A}, bytes(99))), "is truncated or not"),
    "a negative shape": (raw(with_header({"a": entry("F32", [-4], 0, 16)}, bytes(16))), "-4"),
    "a shape of 2^124": (
        raw(with_header({"a": entry("F32", [2**62] * 2, 0, 16)}, bytes(16))),
        "overflow",
    ),
    "an unknown dtype": (raw(with_header({"a": entry("XX", [4], 0, 16)}, bytes(16))), "XX"),
    "metadata of numbers": (raw(with_header({"__metadata__": {"a": 1}})), "is truncated or not"),
    # ------------------------------------------------------------ configuration
    "a newer version": (folder(changed(format_version=99)), "format_version .* got 99.*upgrade"),
    "a version of text": (folder(changed(format_version="1")), "format_version must be .* '1'"),
    "a version that is true": (folder(changed(format_version=True)), "format_version .* got True"),
    "a version of 4000 digits": (folder(changed(format_version=10**4000)), "format_version must"),
    "no object": (folder("[]"), "mapping of fields, got list"),
    "deep JSON": (folder(DEEP), "nested too deep"),
    "deep in a field": (folder('{"rank": ' + "[" * 900 + "]" * 900 + "}"), "rank must be|too deep"),
    "a field twice": (folder('{"rank": 3, "rank": 4}'), "duplicate key 'rank'"),
    "a number of 5000 digits": (folder('{"rank": 1' + "0" * 5000 + "}"), "not a ReftConfig"),
    "a byte order mark": (folder("\ufeff" + CONFIG.to_json()), "not a ReftConfig in JSON"),
    "a rank of 10^9": (folder(changed(rank=10**9)), f"rank must be at most D = {DIM}"),
    "a rank of 10^4000": (folder(changed(rank=10**4000)), f"rank must be at most D = {DIM}"),
    "a rank that is true": (folder(changed(rank=True)), "rank must be an integer .* got True"),
    "a rank of NaN": (folder(changed(rank=NAN)), "rank must be an integer .* got nan"),
    "a rank of 3.0": (folder(changed(rank=3.0)), "rank must be an integer .* got 3.0"),
    "dropout NaN": (folder(changed(dropout=NAN)), r"dropout must be .* got nan"),
    "dropout infinite": (folder(changed(dropout=INF)), r"dropout must be .* got inf"),
    "a layer of 10^9": (folder(changed(layers=[10**9])), "layers must .* got 1000000000"),
    "ten thousand layers": (folder(changed(layers=list(range(10**4)))), "layers must lie in 0 … 2"),
    "a billion positions": (folder(changed(positions="f1000000000")), "n from 1 to 999999"),
    "positions of 5000 digits": (folder(changed(positions="f" + "1" * 5000)), "positions must be"),
    "a billion groups": (
        folder(changed(positions="f999999", tied=False, untied_by="position")),
        "must have shape .*999999",
    ),
    "a path as component": (folder(changed(component="module:../mlp")), "component must be"),
    "a property as component": (folder(changed(component="module:__class__")), "is no part"),
    "a path as block_path": (folder(changed(block_path="../../etc")), "block_path must"),
    "a path as head": (folder(changed(modules_to_save=["../x"])), "modules_to_save"),
    "half a character": (
        folder(json.dumps(changed(base_model_name_or_path="\ud800"))),
        "base_model_name_or_path must be None or a string",
    ),
    "a megabyte of a field": (folder(changed(init="x" * 10**6)), r"init must be .* \(1000002 char"),
    "a megabyte of a name": (folder({"x" * 10**6: 1}), r"has no field .* \(1000002 characters\)"),
    # ------------------------------------------------------------ tensors
    "no tensors": (raw(save({}, metadata={METADATA_KEY: CONFIG.to_json()})), "missing: bias, rot"),
    "a tensor missing": (folder(bias=None), "missing: bias"),
    "a tensor too many": (folder(**{"rotation.evil": torch.ones(1)}), "unknown: rotation.evil"),
    "heads that nobody named": (folder(**{"heads.lm_head.weight": torch.ones(1)}), "lm_head|alone"),
    "another width": (folder(weight=torch.zeros(LAYERS, 1, 3, DIM + 1)), "weight must have shape"),
    "fewer layers": (folder(bias=torch.zeros(LAYERS - 1, 1, 3)), "bias must have shape"),
    "no dimension": (folder(bias=torch.tensor(0.0)), "bias must have shape"),
    "no size": (folder(bias=torch.zeros(0, 1, 3)), "bias must have shape"),
    "integers": (folder(bias=torch.zeros(B, dtype=torch.int64)), "bias must be stored as .*int64"),
    "booleans": (folder(weight=torch.zeros(W, dtype=torch.bool)), "weight must be .*bool"),
    "complex": (folder(weight=torch.zeros(W, dtype=torch.complex64)), "weight must be .*complex64"),
    "float8": (folder(weight=torch.zeros(W).to(torch.float8_e4m3fn)), "weight must be .*float8"),
    "NaN in W": (folder(weight=one_of(NAN, W)), "weight must be finite, it holds NaN"),
    "infinity in W": (folder(weight=one_of(-INF, W)), "weight must be finite, it holds"),
    "NaN in b": (folder(bias=one_of(NAN, B)), "bias must be finite, it holds NaN"),
    "NaN in R": (folder(rotation=one_of(NAN, R)), "rotation must be finite"),
    "beyond float32": (
        folder(weight=one_of(1e300, W, torch.float64)),
        r"weight must be finite in float32, it holds 1e\+300",
    ),
    "NaN in a free R": (
        folder(changed(intervention="noreft"), rotation=one_of(NAN, R)),
        "rotation must be finite",
    ),
    "R of zeros": (folder(rotation=torch.zeros(R)), "orthonormal rows"),
    "R twice as long": (folder(rotation=2 * tensors()["rotation"]), "orthonormal rows"),
}  # fmt: skip


@pytest.fixture
def model() -> ReftModel:
    torch.manual_seed(0)
    model = get_reft_model(llama(), ReftConfig(rank=2, layers=[1]))
    model.add_adapter("other", ReftConfig(rank=1, positions="l1", modules_to_save=["lm_head"]))
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_every_door_refuses_it(name, model, marker, tmp_path):
    make, words = REFUSED[name]
    path = make(tmp_path / "folders" / "new")
    fresh = llama()
    settings = Settings(str(path.parent), cache=str(tmp_path / "cache"))
    resolver = Resolver(settings, LAYERS, DIM)
    doors: dict[str, Callable[[], object]] = {
        "load_adapter": lambda: model.load_adapter(path, "new"),
        "pool": lambda: model.pool.add("new", path),
        "from_pretrained": lambda: ReftModel.from_pretrained(fresh, path),
    }
    before = {id(wrapped): state_of(wrapped) for wrapped in (model, fresh)}
    written = path.stat().st_mtime_ns
    content = None if "pipe" in name else files_of(path)
    for door, call in doors.items():
        with (
            nothing_happens(),
            pytest.raises((ValueError, FileNotFoundError)) as caught,
        ):
            call()
        said = str(caught.value)
        assert re.search(words, said), (door, said[:500])
        assert len(said) < 2000, door
    # The engine copies files into its cache before it reads them, and removes them again.
    if name != "a path as block_path":  # which the engine has no use for
        with pytest.raises(ValueError, match="adapter 'new' can"):
            resolver.resolve("new")
        assert not list((tmp_path / "cache").glob("*"))
    for wrapped in (model, fresh):
        assert_same(before[id(wrapped)], state_of(wrapped))
    assert (model.active_adapter, model.pool.names) == ("default", [])
    assert set(model.configs) == {"default", "other"}
    assert content is None or files_of(path) == content
    assert path.stat().st_mtime_ns == written
    assert not marker.exists()


def test_a_pipe_in_place_of_the_configuration_is_said(model, tmp_path):
    path = pipe(CONFIG_FILE)(tmp_path / "new")
    with pytest.raises(ValueError, match=f"{CONFIG_FILE} must be a plain file"):
        model.load_adapter(path, "new")


#: Wrong base model -> text of the error.
BASES = {
    "wider": (lambda: llama(hidden_size=32), "must have shape"),
    "deeper": (lambda: llama(num_hidden_layers=4), "must have shape"),
    "shallower": (lambda: llama(num_hidden_layers=1), "must have shape"),
    "another architecture": (lambda: gpt2(), "block_path"),
}


@pytest.mark.parametrize("name", BASES)
def test_another_base(name, tmp_path):
    build, words = BASES[name]
    path = put(tmp_path / "a", changed(block_path="model.layers"), tensors())
    base = build()
    before = state_of(base)
    with nothing_happens(), pytest.raises(ValueError, match=words):
        ReftModel.from_pretrained(base, path)
    assert_same(before, state_of(base))


HEAD = {"classifier.weight": torch.zeros(3, DIM), "classifier.bias": torch.zeros(3)}
HEADS = {
    "a shape": ({"classifier.weight": torch.zeros(4, DIM)}, "classifier.weight must have shape"),
    "NaN": ({"classifier.bias": one_of(NAN, (3,))}, "classifier.bias must be finite"),
    "integers": ({"classifier.bias": torch.zeros(3, dtype=torch.int32)}, "must be stored as"),
    "a name": ({"classifier.evil": torch.zeros(3)}, "unknown: classifier.evil"),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name, tmp_path):
    wrong, words = HEADS[name]
    heads = {f"heads.{key}": tensor for key, tensor in {**HEAD, **wrong}.items()}
    path = put(tmp_path / "a", changed(task_type="SEQ_CLS"), {**tensors(), **heads})
    base = bert()
    before = state_of(base)
    with nothing_happens(), pytest.raises(ValueError, match=words):
        ReftModel.from_pretrained(base, path)
    assert_same(before, state_of(base))
    good = put(
        tmp_path / "b", changed(task_type="SEQ_CLS"),
        {**tensors(), **{f"heads.{key}": tensor for key, tensor in HEAD.items()}},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"unknown: heads\.classifier|edits alone"):
        ReftModel(llama()).pool.add("b", good)
    ReftModel.from_pretrained(base, good)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", ".", "a.b", ""])
def test_names_that_are_paths(name, model, tmp_path):
    path = put(tmp_path / "a", CONFIG, tensors())
    before = state_of(model)
    for load in (model.load_adapter, lambda p, n: model.pool.add(n, p)):
        with nothing_happens(), pytest.raises(ValueError, match="name"):
            load(path, name)
    assert_same(before, state_of(model))


@pytest.mark.parametrize("origin", ["http://127.0.0.1:9/x", "someone/model", "{folder}"])
def test_the_base_that_a_file_names_is_not_loaded(origin, model, tmp_path, monkeypatch):
    code = tmp_path / "code"
    code.mkdir()
    (code / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Config"}}')
    (code / "evil.py").write_text("import os; os.mkdir('executed')")
    origin = origin.format(folder=code)
    path = put(tmp_path / "a", changed(base_model_name_or_path=origin), tensors())

    def never(*_, **__):
        raise AssertionError("asked for")

    for cls in ("AutoModel", "AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(f"transformers.{cls}.from_pretrained", never)
    with nothing_happens():
        model.load_adapter(path, "new")
    assert model.configs["new"].base_model_name_or_path == origin
    model.delete_adapter("new")


def test_links_in_a_folder_are_read_and_never_written_through(model, tmp_path):
    """The cache of the hub has symbolic links, which saving replaces."""
    put(tmp_path / "blobs", CONFIG, tensors())
    path = tmp_path / "a"
    path.mkdir()
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        (path / name).symlink_to(tmp_path / "blobs" / name)
    blobs = files_of(tmp_path / "blobs")
    model.load_adapter(path, "new")
    model.save_pretrained(path, adapter_name="new")
    model.delete_adapter("new")
    assert files_of(tmp_path / "blobs") == blobs
    assert not (path / WEIGHTS_FILE).is_symlink()


def test_a_good_folder_goes_through_every_door(tmp_path):
    """A valid folder is accepted, so the folders above are refused for their fault alone."""
    path = put(tmp_path / "folders" / "new", CONFIG, tensors())
    model = ReftModel(llama())
    model.load_adapter(path, "new")
    model.pool.add("served", path)
    resolver = Resolver(Settings(str(path.parent), cache=str(tmp_path / "c")), LAYERS, DIM)
    assert resolver.resolve("new").content_hash
    assert model(tokens(1, 6)).logits.isfinite().all()
    assert load_file(path / WEIGHTS_FILE).keys() == tensors().keys()
    save_file(tensors(), path / WEIGHTS_FILE)
    ReftModel.from_pretrained(llama(), path)
